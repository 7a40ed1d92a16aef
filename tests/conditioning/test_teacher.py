"""Teachers: tiny networks in the published format, and the real EfficientNet that a package carries."""

import json

import numpy as np
import pytest
import torch

from hdm.conditioning.teacher import resized
from hdm.config.axes import TEACHER, discover
from hdm.config.errors import AssetError

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48, "initializer_range": 0.3}


def saved(name, folder):
    import transformers

    torch.manual_seed(0)
    if name == "dinov2":
        del (sizes := dict(SIZES))["intermediate_size"]
        network = transformers.Dinov2Model(transformers.Dinov2Config(image_size=28, patch_size=14, mlp_ratio=2, **sizes))
    elif name == "dinov3":
        config = transformers.DINOv3ViTConfig(image_size=32, patch_size=16, num_register_tokens=4, **SIZES)
        network = transformers.DINOv3ViTModel(config)
    else:
        del (sizes := dict(SIZES))["initializer_range"]
        network = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(image_size=32, patch_size=8, **sizes))
    network.eval().save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": MEAN, "image_std": STD}))
    return network


def teacher(name, **fields):
    variant = discover()["teacher"].get(name)
    return TEACHER.build(variant.config(**fields))


@pytest.mark.parametrize(("name", "patch", "front"), [("dinov2", 14, 1), ("dinov3", 16, 5), ("siglip", 8, 0)])
@pytest.mark.parametrize("grid", [(2, 2), (4, 3)])
def test_patch_tokens_of_a_saved_network(name, patch, front, grid, tmp_path):
    network = saved(name, tmp_path)
    loaded = teacher(name, path=str(tmp_path))
    pixels = torch.rand(2, 3, grid[0] * patch, grid[1] * patch) * 2 - 1  # already the teacher's size: nothing is resampled
    got = loaded.features(pixels, grid)
    unit = ((pixels.double() + 1) / 2).numpy()
    x = (unit - np.array(MEAN)[:, None, None]) / np.array(STD)[:, None, None]
    options = {"interpolate_pos_encoding": True} if name == "siglip" else {}
    with torch.no_grad():
        states = network.double()(pixel_values=torch.from_numpy(x), **options).last_hidden_state
    assert states.shape[1] == front + grid[0] * grid[1]
    assert got.shape == (2, grid[0] * grid[1], 32) and got.dtype == torch.float32
    torch.testing.assert_close(got.double(), states[:, front:], rtol=2e-4, atol=2e-5)
    assert not any(p.requires_grad for p in loaded.network.parameters())


def test_every_size_of_crop_gives_one_feature_per_token(tmp_path):
    saved("dinov2", tmp_path)
    loaded = teacher("dinov2", path=str(tmp_path))
    assert loaded.features(torch.zeros(1, 3, 20, 30), (3, 5)).shape == (1, 15, 32)


def test_resizing_keeps_the_range_and_a_constant():
    edge = torch.cat([torch.full((1, 3, 8, 4), -1.0), torch.ones(1, 3, 8, 4)], dim=3)
    up = resized(edge, (24, 24))
    assert up.min() == 0 and up.max() == 1
    torch.testing.assert_close(resized(torch.zeros(1, 3, 8, 8), (24, 16)), torch.full((1, 3, 24, 16), 0.5), rtol=0, atol=1e-6)


def test_efficientnet_sees_where_things_are():
    """With 7 x 7 cells on a 7 x 7 grid the features are the network's map itself, and their mean is eval's feature."""
    loaded = teacher("efficientnet")
    pixels = torch.rand(1, 3, 224, 224) * 2 - 1
    with torch.no_grad():
        maps = loaded.network.extract_features(((pixels + 1) * 127.5 - 127) / 128)
    got = loaded.features(pixels, (7, 7))
    torch.testing.assert_close(got[0], maps[0].flatten(1).T, rtol=1e-3, atol=1e-3)
    assert loaded.width == got.shape[2] == 1280
    half = torch.full((1, 3, 64, 128), 1.0)
    half[..., 64:] = torch.rand(1, 3, 64, 64) * 2 - 1
    tokens = loaded.features(half, (4, 8)).view(4, 8, 1280)
    plain = loaded.features(torch.ones(1, 3, 64, 128), (4, 8)).view(4, 8, 1280)
    change = (tokens - plain).norm(dim=-1).mean(0)
    assert change[0] < 0.5 * change[-1]


@pytest.mark.parametrize("name", ["dinov2", "dinov3", "siglip"])
def test_an_unknown_folder(name, tmp_path):
    with pytest.raises(AssetError, match=r"teacher\.path=/none: no such folder") as error:
        teacher(name, path="/none")
    assert "\n" not in str(error.value)


def test_a_network_without_its_preprocessing(tmp_path):
    saved("dinov2", tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("{}")
    with pytest.raises(AssetError, match=r"preprocessor_config\.json has no image_mean") as error:
        teacher("dinov2", path=str(tmp_path))
    assert "\n" not in str(error.value)


def test_another_kind_of_network(tmp_path):
    saved("siglip", tmp_path)
    with pytest.raises(AssetError, match=r"weights of Dinov2Model.*another kind") as error:
        teacher("dinov2", path=str(tmp_path))
    assert "\n" not in str(error.value)
