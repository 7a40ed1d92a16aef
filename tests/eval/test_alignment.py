"""Alignment: the ridge map against its definition and on real emoji; CLIP, in the real format, against transformers' own."""

import io
import json

import numpy as np
import pytest
import torch
from pictograms import pictograms
from rich.console import Console

from eval.alignment import Clip, RidgeMiniLM, image_to_text, measure, resolve, text_to_image, unit
from eval.extractor import named
from eval.features import features
from eval.measure import Drawn
from eval.ridge import PENALTIES, SentenceEncoder, fit
from eval.samples import CaptionedImages
from hdm.config.errors import AssetError
from hdm.config.schema import Alignment, EvalConfig, RunConfig

CPU = torch.device("cpu")


def drawn(pixels, captions, cache, **options):
    run = RunConfig(cache=str(cache))
    run.eval = EvalConfig(**options)
    real = CaptionedImages(pixels=pixels, views=torch.zeros(len(captions), 6), captions=list(captions))
    return Drawn(run=run, real=real, images=pixels.flip(0), device=CPU, console=Console(quiet=True))


# --- the ridge map ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(30, 8, 3), (12, 20, 4)])  # more samples than features, and fewer
def test_ridge_solves_the_normal_equations_at_the_penalty_of_least_leave_one_out_error(shape):
    n, f, d = shape
    draw = np.random.default_rng(0)
    x = draw.standard_normal((n, f)) + 3
    y = x @ draw.standard_normal((f, d)) + 2 * draw.standard_normal((n, d)) - 1
    ridge = fit(x, y, source="")
    a, b = x - x.mean(0), y - y.mean(0)

    def solve(a, b, penalty):
        return np.linalg.solve(a.T @ a + penalty * np.eye(f), a.T @ b)

    def left_out(penalty):
        rows = range(n)
        return np.mean([(b[i] - a[i] @ solve(np.delete(a, i, 0), np.delete(b, i, 0), penalty)) ** 2 for i in rows])

    assert ridge.penalty == min(PENALTIES, key=left_out)
    np.testing.assert_allclose(ridge.weight, solve(a, b, ridge.penalty), atol=1e-10)
    np.testing.assert_allclose(ridge.predict(x) + ridge.text_mean, a @ ridge.weight + y.mean(0), atol=1e-10)


def test_sentences_are_mean_pooled_and_of_length_one_whatever_their_batch(tmp_path):
    encoder = SentenceEncoder(tmp_path, CPU)
    texts = ["red car", "a cat with tears of joy, happy, laughing, face, animal"]
    together = encoder.encode(texts)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(together, np.concatenate([encoder.encode([t]) for t in texts]), atol=1e-5)
    near, far = encoder.encode(["automobile", "banana pudding"])
    assert together[0] @ near > together[0] @ far + 0.2


@pytest.mark.slow
def test_true_captions_beat_shuffled_ones_on_held_out_emoji(tmp_path):
    pixels, captions = pictograms(400)
    extractor, sentences = named("efficientnet", EvalConfig()), SentenceEncoder(tmp_path, CPU)
    x = features(pixels, extractor, cache=tmp_path, device=CPU, title="")
    held_out = np.arange(400) % 4 == 0
    y = sentences.encode(captions)
    ridge = fit(x[~held_out], y[~held_out], source="")
    images, texts = unit(ridge.predict(x[held_out])), unit(y[held_out] - ridge.text_mean)
    true = (images * texts).sum(1).mean()
    shuffled = [(images * texts[np.random.default_rng(i).permutation(100)]).sum(1).mean() for i in range(20)]
    assert true > 0.1
    assert abs(np.mean(shuffled)) < 0.03
    assert true > max(shuffled) + 0.05
    own = np.arange(100)
    assert image_to_text(images, texts, k=5, own=own).mean() > 3 * 5 / 100  # chance is 5 of 100
    assert text_to_image(images, texts, k=5, own=own).mean() > 3 * 5 / 100


# --- retrieval --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 3, 6])
def test_retrieval_in_both_directions_equals_torchmetrics(k):
    """25 captions with 60 images: some have two images, some three, so "a hit is any of one's own" counts."""
    from hdm import torchvision_cpu

    torchvision_cpu.declare()
    from torchmetrics.functional.retrieval import retrieval_hit_rate

    draw = np.random.default_rng(k)
    captions = unit(draw.standard_normal((25, 6)))
    own = np.arange(60) % 25
    images = unit(captions[own] + 1.5 * draw.standard_normal((60, 6)))
    cosines, mine = torch.from_numpy(images @ captions.T), torch.from_numpy(own[:, None] == np.arange(25))
    for found, scores, relevant in (
        (image_to_text(images, captions, k=k, own=own), cosines, mine),
        (text_to_image(images, captions, k=k, own=own), cosines.T, mine.T),
    ):
        wanted = [float(retrieval_hit_rate(row, hit, top_k=k)) for row, hit in zip(scores, relevant)]
        assert found.tolist() == wanted
        assert 0 < sum(wanted) < len(wanted)


def test_equally_near_ones_cost_nothing():
    captions = np.eye(8)
    images = np.eye(8)
    images[0] = unit(np.array([[1.0, 2, 2, 0, 0, 0, 0, 0]]))  # its own caption is third; captions 1 and 2 have their own nearer
    own = np.arange(8)
    assert [image_to_text(images, captions, k=k, own=own).mean() for k in (1, 2, 3)] == [7 / 8, 7 / 8, 1]
    assert text_to_image(images, captions, k=1, own=own).mean() == 1
    twice = np.eye(8)[[5, 5]]  # the same caption twice: either is right
    for direction in (image_to_text, text_to_image):
        assert direction(twice, twice, k=1, own=np.arange(2)).mean() == 1


# --- CLIP -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory):
    """A CLIP of a few thousand random parameters, saved with tokenizer and image processor as the real ones are."""
    from hdm import torchvision_cpu

    torchvision_cpu.declare()
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

    folder = tmp_path_factory.mktemp("clip")
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)] + [","]
    vocabulary = ["<|startoftext|>", "<|endoftext|>", *letters, *(c + "</w>" for c in letters)]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77).save_pretrained(folder)
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {**size, "vocab_size": len(vocabulary), "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    config = CLIPConfig(text_config=text, vision_config={**size, "image_size": 32, "patch_size": 8}, projection_dim=16)
    torch.manual_seed(0)  # transformers draws initial weights from the global generator
    model = CLIPModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


CAPTIONS = ["red car", "cat face, animal", "zebra", "a " * 100]


def test_clip_gives_the_cosines_of_transformers(tiny_clip):
    from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

    pixels, _ = pictograms(4, size=48)
    clip = Clip(str(tiny_clip), CPU)
    cosines = clip.embed_images(pixels, "") @ clip.embed_captions(CAPTIONS).T
    model = CLIPModel.from_pretrained(tiny_clip).eval()
    tokens = AutoTokenizer.from_pretrained(tiny_clip)(CAPTIONS, padding=True, truncation=True, return_tensors="pt")
    images = CLIPImageProcessor.from_pretrained(tiny_clip)(list(pixels), return_tensors="pt")
    with torch.no_grad():
        wanted = model(**tokens, **images).logits_per_image / model.logit_scale.exp()
    np.testing.assert_allclose(cosines, wanted.numpy(), atol=2e-3)  # Pillow's bicubic against torchvision's
    assert np.abs(cosines).max() > 0.05
    assert clip.score(np.array([0.3, -0.2, 0.1])) == pytest.approx(100 * 0.4 / 3)


def test_clip_is_taken_where_it_is_and_names_its_numbers(tiny_clip, tmp_path):
    pixels, _ = pictograms(4)
    result = measure(drawn(pixels, CAPTIONS, tmp_path, clip=str(tiny_clip)))
    names = {f"alignment/clip{part}" for part in ("", "_i2t_r5", "_t2i_r5")}
    assert set(result.values) == {f"{name}{suffix}" for name in names for suffix in ("", "_real")}
    assert set(result.errors) == names
    assert result.protocol["aligner"]["name"] == "clip"
    clip = Clip(str(tiny_clip), CPU)
    own = (clip.embed_images(pixels.flip(0), "") * clip.embed_captions(CAPTIONS)).sum(1)
    assert result.values["alignment/clip"] == pytest.approx(100 * np.maximum(own, 0).mean())


def test_missing_clip_is_one_line_with_a_remedy(tmp_path):
    pixels, _ = pictograms(4)
    with pytest.raises(
        AssetError, match=r"^eval.clip=nobody/no-clip: no CLIP .*hf download nobody/no-clip.*eval.clip=FOLDER[^\n]*$"
    ):
        resolve(drawn(pixels, CAPTIONS, tmp_path, alignment=Alignment.clip, clip="nobody/no-clip"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(AssetError, match="no CLIP in this folder"):
        Clip(str(tmp_path / "empty"), CPU)


def test_auto_falls_back_loudly(tmp_path, monkeypatch):
    out = io.StringIO()
    subject = drawn(pictograms(4)[0], CAPTIONS, tmp_path, clip="nobody/no-clip")
    subject.console = Console(file=out, width=500)
    monkeypatch.setattr(RidgeMiniLM, "__init__", lambda *_: None)
    assert resolve(subject).name == "ridge_minilm"
    assert "not CLIP" in out.getvalue()
