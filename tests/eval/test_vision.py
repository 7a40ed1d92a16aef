"""DINOv2 and CLIP as extractors, on tiny networks in the real format, against the transformers library; CMMD by brute force."""

import numpy as np
import pytest
import torch
from pictograms import pictograms
from rich.console import Console

from eval.distribution import measure
from eval.extractor import named
from eval.features import features
from eval.measure import Drawn
from eval.samples import CaptionedImages
from hdm import torchvision_cpu
from hdm.config.errors import AssetError
from hdm.config.schema import EvalConfig, RunConfig

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A DINOv2 and a CLIP of a few thousand random parameters, saved as the real ones are."""
    torchvision_cpu.declare()
    from transformers import BitImageProcessor, CLIPConfig, CLIPImageProcessor, CLIPModel, Dinov2Config, Dinov2Model

    home = tmp_path_factory.mktemp("vision")
    torch.manual_seed(0)  # transformers draws initial weights from the global generator
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    Dinov2Model(Dinov2Config(**size, image_size=56, patch_size=14)).save_pretrained(home / "dinov2")
    BitImageProcessor().save_pretrained(home / "dinov2")
    text = {**size, "intermediate_size": 48, "vocab_size": 60}
    vision = {**size, "intermediate_size": 48, "image_size": 32, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(home / "clip")
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(home / "clip")
    return home


def by_the_library(kind, folder, pixels):
    """Through the image processor of the library, which resizes by Pillow's bicubic filter too."""
    from PIL import Image
    from transformers import CLIPModel, Dinov2Model
    from transformers.image_processing_base import ImageProcessingMixin

    facts, _ = ImageProcessingMixin.get_image_processor_dict(folder)
    side = {"dinov2": 56, "clip": 32}[kind]
    tiles = [Image.fromarray(p.permute(1, 2, 0).numpy()).resize((side, side), Image.Resampling.BICUBIC) for p in pixels]
    x = np.stack([(np.asarray(tile, dtype=np.float64) / 255 - facts["image_mean"]) / facts["image_std"] for tile in tiles])
    x = torch.from_numpy(x).permute(0, 3, 1, 2).float()
    with torch.no_grad():
        if kind == "dinov2":
            return Dinov2Model.from_pretrained(folder)(pixel_values=x).pooler_output  # the normed class token
        return CLIPModel.from_pretrained(folder)(input_ids=torch.zeros(1, 2, dtype=int), pixel_values=x).image_embeds


@pytest.mark.parametrize("kind", ["dinov2", "clip"])
def test_features_are_those_of_the_library(folders, tmp_path, kind):
    pixels, _ = pictograms(5, size=48)
    extractor = named(kind, EvalConfig(**{kind: str(folders / kind)}))
    found = features(pixels, extractor, cache=tmp_path, device=CPU, title="")
    np.testing.assert_allclose(found, by_the_library(kind, folders / kind, pixels).numpy(), atol=2e-5)
    assert len(extractor.digest) == 64


@pytest.mark.slow
def test_fd_and_cmmd_follow_their_definitions(folders, tmp_path):
    pixels, _ = pictograms(40, size=32)
    real, other = pixels[::2], pixels[1::2].flip(3)
    run = RunConfig(cache=str(tmp_path))
    run.eval = EvalConfig(dinov2=str(folders / "dinov2"), clip=str(folders / "clip"), bootstrap=5)
    images = CaptionedImages(pixels=real, views=torch.zeros(20, 6), captions=["x"] * 20)
    drawn = Drawn(run=run, real=images, images=other, device=CPU, console=Console(quiet=True))
    found = measure(drawn, features="clip", kinds=("cmmd",))
    x, y = (by_the_library("clip", folders / "clip", p).double().numpy() for p in (other, real))

    def kernel(a, b):
        return np.mean([[np.exp(-((p - q) ** 2).sum() / 200) for q in b] for p in a])

    assert found.values["cmmd/clip"] == pytest.approx(1000 * (kernel(x, x) + kernel(y, y) - 2 * kernel(x, y)), abs=1e-3)
    assert found.errors["cmmd/clip"] > 0
    assert found.protocol["extractor"]["name"] == "clip"
    distances = measure(drawn, features="dinov2", kinds=("fd", "kd"))
    assert set(distances.values) == {"fd/dinov2", "kd/dinov2"}


def test_incomplete_folders_are_one_line(tmp_path):
    with pytest.raises(AssetError, match=r"eval.dinov2=nobody/no-dino: no DINOv2 .*hf download nobody/no-dino.*eval.dinov2=FOLDER"):
        named("dinov2", EvalConfig(dinov2="nobody/no-dino"))
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "config.json").write_text("{}")
    with pytest.raises(AssetError, match=r"has no preprocessor_config\.json"):
        named("clip", EvalConfig(clip=str(tmp_path / "half")))
