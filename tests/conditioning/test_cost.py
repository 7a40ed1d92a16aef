"""Counted FLOPs against closed forms of the published shapes."""

from collections import Counter

import pytest

from hdm.conditioning.autoencoder import DCAEConfig, KLConfig, PixelConfig
from hdm.conditioning.cost import FrozenFlops, autoencoder_flops, text_encoder_flops
from hdm.conditioning.text_encoder import Gemma3Config, HashConfig, MiniLMConfig, Qwen3Config, SmolLM2Config, T5Config


def test_qwen3_is_its_closed_form():
    tokens, width, mlp, layers, heads, groups, head = 256, 1024, 3072, 28, 16, 8, 128
    projections = width * head * (heads + 2 * groups) + heads * head * width + 3 * width * mlp
    attention = 2 * tokens * heads * head  # q k^T and weights v, every key counted
    assert text_encoder_flops(Qwen3Config(), tokens) == pytest.approx(2 * tokens * layers * (projections + attention), rel=1e-3)


@pytest.mark.parametrize(
    ("config", "width", "mlp", "layers", "heads", "groups", "head"),
    [(Gemma3Config(), 1152, 6912, 26, 4, 1, 256), (SmolLM2Config(), 576, 1536, 30, 9, 3, 64)],
    ids=["gemma3", "smollm2"],
)
def test_gemma3_and_smollm2_are_their_closed_forms(config, width, mlp, layers, heads, groups, head):
    tokens = 128
    projections = width * head * (heads + 2 * groups) + heads * head * width + 3 * width * mlp
    attention = 2 * tokens * heads * head
    assert text_encoder_flops(config, tokens) == pytest.approx(2 * tokens * layers * (projections + attention), rel=1e-3)


def test_qwen3_on_256_tokens_as_another_tool_counted_it():
    assert text_encoder_flops(Qwen3Config(), 256) / 1e12 == pytest.approx(0.241, rel=0.01)


def test_what_was_computed_is_priced_by_its_lengths_and_sizes():
    """Rows of 48 and 200 tokens, between and beyond the two lengths that are counted; images square and not."""
    frozen = FrozenFlops(Qwen3Config(), KLConfig())
    rows, images = Counter({48: 3, 200: 2}), Counter({(64, 64): 4, (64, 96): 1})
    frozen.add(rows, images)
    assert not rows
    assert not images
    expected = 3 * text_encoder_flops(Qwen3Config(), 48) + 2 * text_encoder_flops(Qwen3Config(), 200)
    expected += 4 * autoencoder_flops(KLConfig(), 64) + autoencoder_flops(KLConfig(), 64, 96)
    assert frozen.total() == pytest.approx(expected, rel=1e-9)
    assert frozen.total() == pytest.approx(expected, rel=1e-9), "reading it changes nothing"
    frozen.add(Counter({48: 1}), Counter())
    assert frozen.total() == pytest.approx(expected + text_encoder_flops(Qwen3Config(), 48), rel=1e-9)


def test_one_unknown_price_makes_the_sum_unknown():
    frozen = FrozenFlops(T5Config(), PixelConfig())
    assert frozen.total() == 0
    frozen.add(Counter({8: 1}), Counter())
    assert frozen.total() is None


def test_minilm_reads_the_shape_that_its_package_carries():
    tokens, width, mlp, layers = 16, 384, 1536, 6
    closed = 2 * tokens * layers * (4 * width * width + 2 * width * mlp + 2 * tokens * width)
    assert text_encoder_flops(MiniLMConfig(), tokens) == pytest.approx(closed, rel=0.01)  # plus the pooler


@pytest.mark.parametrize(("size", "teraflops"), [(256, 0.273), (512, 1.117), (768, 2.609), (1024, 4.879)])
def test_sdxl_autoencoder(size, teraflops):
    """Figures counted from the same shape by another tool (quadratic in the pixels but for one attention)."""
    assert autoencoder_flops(KLConfig(), size) / 1e12 == pytest.approx(teraflops, rel=0.01)


def test_nothing_to_count_and_nothing_known():
    assert text_encoder_flops(HashConfig(), 16) == 0
    assert autoencoder_flops(PixelConfig(), 64) == 0
    assert text_encoder_flops(T5Config(), 16) is None
    assert autoencoder_flops(DCAEConfig(), 256) is None
