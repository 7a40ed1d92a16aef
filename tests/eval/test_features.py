"""FID and KID through torch-fidelity, against their definitions in double precision, on real images."""

import io

import numpy as np
import pytest
import torch
from pictograms import pictograms
from PIL import Image, ImageFilter
from rich.console import Console

from eval import extractor as module
from eval.distribution import kid_estimator, measure
from eval.extractor import named, resolve
from eval.features import features
from eval.measure import Drawn
from eval.samples import CaptionedImages
from hdm.config.errors import AssetError
from hdm.config.schema import EvalConfig, RunConfig
from hdm.files import sha256

CPU = torch.device("cpu")
COUNT = 40


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def blurred(pixels, radius):
    images = [Image.fromarray(image.permute(1, 2, 0).numpy()).filter(ImageFilter.GaussianBlur(radius)) for image in pixels]
    return torch.from_numpy(np.stack([np.array(image) for image in images])).permute(0, 3, 1, 2)


def noisy(pixels, std):
    noise = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0))
    return (pixels + std * noise).round().clamp(0, 255).to(torch.uint8)


def measured(real, images, cache, **options):
    run = RunConfig(cache=str(cache))
    run.eval = EvalConfig(features="efficientnet", **options)
    captioned = CaptionedImages(pixels=real, views=torch.zeros(len(real), 6), captions=["x"] * len(real))
    return measure(Drawn(run=run, real=captioned, images=images, device=CPU, console=Console(quiet=True))).values


def frechet(x, y):
    """|m - m'|^2 + tr S + tr T - 2 tr (S T)^(1/2); with S = A'A and T = B'B the last trace is the nuclear norm of A B'."""
    a, b = (x - x.mean(0)) / np.sqrt(len(x) - 1), (y - y.mean(0)) / np.sqrt(len(y) - 1)
    cross = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    return ((x.mean(0) - y.mean(0)) ** 2).sum() + (a**2).sum() + (b**2).sum() - 2 * cross


def kernel_distance(x, y):
    """Unbiased squared MMD with the kernel (x.y / d + 1)^3, summed pair by pair."""
    d, n, m = x.shape[1], len(x), len(y)
    within = sum((x[i] @ x[j] / d + 1) ** 3 for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    without = sum((y[i] @ y[j] / d + 1) ** 3 for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    between = sum((a @ b / d + 1) ** 3 for a in x for b in y) / (n * m)
    return within + without - 2 * between


def test_fid_and_kid_follow_their_definitions(cache):
    real, _ = pictograms(2 * COUNT)
    other, real = real[::2], real[1::2]
    values = measured(real, other, cache)
    extractor = named("efficientnet", EvalConfig())
    x, y = (features(p, extractor, cache=cache, device=CPU, title="") for p in (other, real))
    assert x.shape == (COUNT, 1280)
    assert values["fid/efficientnet"] == pytest.approx(frechet(x, y), rel=1e-4)
    assert values["kid/efficientnet"] == pytest.approx(kernel_distance(x, y), rel=1e-9)


def test_damaged_cache_is_made_again(tmp_path):
    real, _ = pictograms(4)
    whole = measured(real, noisy(real, 60), tmp_path)
    files = sorted((tmp_path / "features").iterdir())
    assert len(files) >= 4  # features and statistics of both sets
    for i, path in enumerate(files):
        path.write_bytes(path.read_bytes()[:1000] if i % 2 else b"")
    assert measured(real, noisy(real, 60), tmp_path) == whole


def test_kid_is_near_zero_for_the_same_kind_of_images_and_fid_is_zero_for_the_same_images(cache):
    pixels, _ = pictograms(2 * COUNT)
    same_kind, far = measured(pixels[1::2], pixels[::2], cache), measured(pixels[1::2], noisy(pixels[1::2], 60), cache)
    assert abs(same_kind["kid/efficientnet"]) < 0.1 * far["kid/efficientnet"]
    assert measured(pixels[1::2], pixels[1::2], cache)["fid/efficientnet"] == pytest.approx(0, abs=1e-2)


@pytest.mark.parametrize(("damage", "levels"), [(blurred, (1.0, 2.0, 4.0)), (noisy, (10, 30, 60))])
def test_both_grow_with_damage(cache, damage, levels):
    pixels, _ = pictograms(2 * COUNT)
    real, other = pixels[1::2], pixels[::2]
    series = [measured(real, images, cache) for images in (other, *(damage(other, level) for level in levels))]
    for name in ("fid/efficientnet", "kid/efficientnet"):
        values = [row[name] for row in series]
        assert values == sorted(values), (name, values)
        assert values[-1] > values[0]


def test_preprocessing_is_what_is_documented():
    from efficientnet_lite_pytorch import EfficientNet

    from eval.efficientnet import EfficientNetLite0

    pixels, _ = pictograms(2, size=128)  # already 128 px: no resizing
    weights = named("efficientnet", EvalConfig()).weights
    found = EfficientNetLite0("x", ["1280"], feature_extractor_weights_path=str(weights))(pixels)[0]
    net = EfficientNet.from_name("efficientnet-lite0").eval()
    net.load_state_dict(torch.load(weights, weights_only=True))
    with torch.no_grad():
        wanted = net.extract_features((pixels.float() - 127) / 128).mean((2, 3))
    torch.testing.assert_close(found.float(), wanted, rtol=1e-3, atol=1e-4)


def test_features_are_computed_once(cache, monkeypatch):
    pixels, _ = pictograms(4)
    extractor = named("efficientnet", EvalConfig())
    first = features(pixels, extractor, cache=cache, device=CPU, title="")

    def refuse(*_, **__):
        raise AssertionError("computed again")

    monkeypatch.setattr("torch_fidelity.utils.create_feature_extractor", refuse)
    assert np.array_equal(features(pixels, extractor, cache=cache, device=CPU, title=""), first)
    with pytest.raises(AssertionError, match="computed again"):
        features(pixels.flip(0), extractor, cache=cache, device=CPU, title="")


def test_kid_uses_all_images_up_to_a_thousand():
    assert kid_estimator(256) == {"kid_subsets": 1, "kid_subset_size": 256}
    assert kid_estimator(5000) == {"kid_subsets": 100, "kid_subset_size": 1000}


def test_missing_inception_weights_are_one_line_with_path_and_remedy(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(AssetError) as caught:
        named("inception", EvalConfig())
    message = str(caught.value)
    assert f"{tmp_path}/hub/checkpoints/weights-inception-2015-12-05-6726825d.pth" in message
    assert "eval.inception=FILE" in message
    assert "\n" not in message
    with pytest.raises(AssetError, match=r"no weights at nowhere.pth"):
        named("inception", EvalConfig(inception="nowhere.pth"))


def test_auto_says_loudly_which_extractor_it_takes(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    out = io.StringIO()
    assert resolve(EvalConfig(), Console(file=out, width=400)).name == "efficientnet"
    assert "EfficientNet-Lite0, not Inception" in out.getvalue()


def test_other_weights_under_inceptions_name_are_refused(tmp_path):
    (tmp_path / "w.pth").write_bytes(b"something else")
    with pytest.raises(AssetError, match=r"w\.pth is not weights-inception.*SHA-256"):
        named("inception", EvalConfig(inception=str(tmp_path / "w.pth")))


@pytest.mark.slow
def test_inception_runs_on_weights_of_its_format(tmp_path, monkeypatch, cache):
    """The real network and loading path; the values are random, since the real file cannot be had here."""
    from hdm import torchvision_cpu

    torchvision_cpu.declare()
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    torch.save({}, tmp_path / "empty.pth")
    with monkeypatch.context() as patch:
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        net = FeatureExtractorInceptionV3("x", ["2048"], feature_extractor_weights_path=str(tmp_path / "empty.pth"))
    torch.save(net.state_dict(), tmp_path / "w.pth")
    monkeypatch.setattr(module, "INCEPTION_FILE", f"weights-inception-{sha256(tmp_path / 'w.pth')[:8]}.pth")
    pixels, _ = pictograms(4)
    extractor = resolve(EvalConfig(inception=str(tmp_path / "w.pth")), Console(quiet=True))
    assert extractor.name == "inception"
    found = features(pixels, extractor, cache=cache, device=CPU, title="")
    assert found.shape == (4, 2048)
    np.testing.assert_allclose(found, net(pixels)[0].double().numpy(), rtol=1e-4, atol=1e-5)
