"""`python -m hdm.export`: the files, what reads them back, the card, the refusals."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_runs import NANO

from hdm import cli, torchvision_cpu
from hdm.config.compose import compose, flatten
from hdm.config.errors import CheckpointError, ConfigError, HdmError
from hdm.export import __main__ as export
from hdm.model import Architecture, Condition, build, full_view, published
from hdm.track.events import EventLog
from hdm.train.checkpoint import load_model

UPSTREAM = [
    "preset=xut_upstream", "model=nano", "model.dim=64", "model.mlp_dim=32", "model.heads=1", "model.head_dim=64", "model.depth=1",
    "model.patch=2", "text_encoder=hash", "text_encoder.width=12", "crop.size=16",
]  # fmt: skip


def run(*arguments):
    with pytest.raises(SystemExit) as end:
        cli.main(export.command, export.__doc__, list(arguments))
    return end.value.code


def test_one_file_loads_bit_equal_everywhere(written, capsys):
    folder = written()
    assert run(f"ckpt={folder}", "format=safetensors", "out=e", "guidance.scale=2.5") == 0
    assert capsys.readouterr().out.splitlines() == ["e/model.safetensors", "e/README.md"]
    there, back = load_model(folder), load_model("e/model.safetensors")
    assert all(torch.equal(back.model.state_dict()[name], tensor) for name, tensor in there.model.state_dict().items())
    assert (back.samples, back.weights, back.run.guidance.scale) == (64, "ema-power", 2.5)
    with safe_open("e/model.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["config"])["model.dim"] == 16
    from hdm import sample

    with pytest.raises(SystemExit) as end:
        cli.main(sample.command, sample.__doc__, ["ckpt=e/model.safetensors", "prompt=a", "out=o.png"])
    assert end.value.code == 0
    assert Path("o/0000.png").is_file()


@pytest.mark.parametrize(("dtype", "kind"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_numbers_are_stored_as_asked(written, dtype, kind):
    folder = written()
    assert run(f"ckpt={folder}", "format=safetensors", "out=e", f"dtype={dtype}") == 0
    source = load_file(folder / "checkpoints/samples-000000064/ema-power.safetensors")
    stored = load_file("e/model.safetensors")
    assert all(torch.equal(stored[name], tensor.to(kind)) for name, tensor in source.items())
    assert load_model("e/model.safetensors").model.patch.proj.weight.dtype is torch.float32


def test_values_beyond_fp16_are_not_made_infinite(written, capsys):
    folder = written()
    file = folder / "huge.safetensors"
    assert run(f"ckpt={folder}", "format=safetensors", f"out={folder / 'e'}") == 0
    with safe_open(folder / "e/model.safetensors", framework="pt") as opened:
        header = opened.metadata()
    tensors = load_file(folder / "e/model.safetensors")
    tensors["out.proj.bias"] += 1e6
    save_file(tensors, file, header)
    assert run(f"ckpt={file}", "format=safetensors", "out=f", "dtype=fp16") == 2
    assert "dtype=fp16: 'out.proj.bias' has values beyond its range; use dtype=bf16" in capsys.readouterr().err


def test_comfyui_is_the_published_layout(written, capsys):
    folder = written(*UPSTREAM, "autoencoder=kl")
    assert run(f"ckpt={folder}", "format=comfyui", "out=c") == 0
    assert "not tested" in capsys.readouterr().out
    file = load_file("c/run.safetensors")
    assert all(name.startswith("unet.model.") for name in file)
    model = load_model(folder).model
    back = published.from_published(file, model, source="f")
    assert all(torch.equal(back[name], tensor) for name, tensor in model.state_dict().items())


@pytest.fixture
def encoders(tmp_path):
    """A causal text encoder and an autoencoder with random weights, in the folders that the published ones come in."""
    torchvision_cpu.declare()
    import diffusers
    import transformers

    words = ["a cat sits on a mat", "a red car, side view"] * 3
    tokenizer = transformers.Qwen2Tokenizer().train_new_from_iterator(words, 300)
    tokenizer.save_pretrained(tmp_path / "text")
    config = transformers.Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=64,
    )  # fmt: skip
    transformers.Qwen3ForCausalLM(config).save_pretrained(tmp_path / "text")
    diffusers.AutoencoderKL(
        block_out_channels=(8, 16), norm_num_groups=4, down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    ).save_pretrained(tmp_path / "vae")  # fmt: skip
    return [
        "text_encoder=qwen3", f"text_encoder.path={tmp_path / 'text'}", "text_encoder.width=16", "text_encoder.max_length=32",
        "autoencoder=kl", f"autoencoder.path={tmp_path / 'vae'}", "autoencoder.factor=2",
    ]  # fmt: skip


def test_all_parts_of_comfyui_are_the_networks_that_the_libraries_read(written, encoders, tmp_path):
    """What stands under each prefix, put into a fresh network of the library, is the frozen one; nothing else is there."""
    import diffusers
    import transformers

    folder = written(*UPSTREAM, *encoders)
    assert run(f"ckpt={folder}", "format=comfyui", "parts=all", "out=c", "dtype=fp16") == 0
    file = load_file("c/run.safetensors")
    assert {tensor.dtype for tensor in file.values()} == {torch.float16}
    config = transformers.AutoConfig.from_pretrained(tmp_path / "text")
    for prefix, fresh, source in (
        ("te.text_models.0.", transformers.AutoModel.from_config(config), "text"),
        ("vae.", diffusers.AutoencoderKL.from_config(diffusers.AutoencoderKL.load_config(tmp_path / "vae")), "vae"),
    ):
        part = {name.removeprefix(prefix): tensor.float() for name, tensor in file.items() if name.startswith(prefix)}
        fresh.load_state_dict(part)  # strictly: no name is missing, none unknown
        there = load_file(next((tmp_path / source).glob("*.safetensors")))
        there = {name.removeprefix("model."): tensor for name, tensor in there.items() if not name.startswith("lm_head")}
        assert part.keys() == there.keys()
        assert all(torch.equal(part[name], tensor.half().float()) for name, tensor in there.items())
    assert {name.split(".")[0] for name in file} == {"unet", "te", "vae"}
    assert (
        load_model(folder).model.state_dict().keys()
        == published.from_published(
            {name: tensor for name, tensor in file.items() if name.startswith("unet.")}, load_model(folder).model, source="f"
        ).keys()
    )


def test_a_published_file_is_imported(written, capsys):
    """What comfyui wrote becomes a file that every command reads; it knows nothing of our run."""
    folder = written(*UPSTREAM, "autoencoder=kl")
    assert run(f"ckpt={folder}", "format=comfyui", "out=c") == 0
    assert run("ckpt=c/run.safetensors", "format=safetensors", "out=i", *UPSTREAM, "autoencoder=kl") == 0
    there, back = load_model(folder), load_model("i/model.safetensors")
    assert all(torch.equal(back.model.state_dict()[name], tensor) for name, tensor in there.model.state_dict().items())
    capsys.readouterr()
    assert run("ckpt=c/run.safetensors", "format=safetensors", "out=j", "model=nano") == 2
    assert "preset=xut_upstream" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([], "the published layout cannot say backbone.residual=raw"),
        ([*UPSTREAM, "model.heads=2", "model.head_dim=32"], "heads of 64 channels"),
        (UPSTREAM, "latents of 4 channels"),
        ([*UPSTREAM, "objective=x_prediction"], "expects a velocity"),
    ],
)
def test_comfyui_refuses_what_its_node_cannot_express(written, lines, words, capsys):
    assert run(f"ckpt={written(*lines)}", "format=comfyui", "out=c") == 2
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 1
    assert words in err[0]
    assert not Path("c").exists()


def test_the_card_says_what_the_run_folder_knows(written):
    folder = written("hardware.dollars_per_hour=3", "hardware.devices=2", "data=openmoji")
    log = EventLog(folder)
    log.dataset("openmoji-x", "d" * 64, "train")
    log.metrics({"val/loss": 0.5}, 32)
    log.metrics({"val/loss": 0.25}, 64)
    log.close()
    (folder / "eval").mkdir()
    for name, samples in (("fid", 64), ("old", 32)):
        report = {"metrics": {f"kid/{name}": 0.125}, "samples": samples, "weights": "ema-power", "protocol_digest": "ab12cd34"}
        (folder / "eval" / f"{name}.json").write_text(json.dumps(report))
    assert run(f"ckpt={folder}", "format=safetensors", "out=e", "license=CC0-1.0") == 0
    card = Path("e/README.md").read_text()
    count = sum(p.numel() for p in load_model(folder).model.parameters())
    for words in (
        "license: CC0-1.0", f"{count:,} parameters", "CC BY-SA 4.0", "sha256 " + "d" * 64, "| kid/fid | 0.125 | ab12cd34 |",
        "| val/loss | 0.25 |", "- 64 images", "- 4 device hours (", "- 3e+09 FLOPs", "- $12.00 at $3.0 an hour",
        "`model.dim` | 16",
    ):  # fmt: skip
        assert words in card, words
    assert "kid/old" not in card  # of other weights
    log = EventLog(folder)
    log.metrics({"val/loss": 0.25, "val/loss_raw": 0.75}, 64)
    log.close()
    assert run(f"ckpt={folder}", "format=safetensors", "weights=raw", "out=raw") == 0
    assert "| val/loss_raw | 0.75 |" in Path("raw/README.md").read_text()
    assert "0.25" not in Path("raw/README.md").read_text()


def test_adapters_are_merged_or_written_alone(tmp_path):
    from hdm.train import checkpoint
    from hdm.train.adapters import adapted, merged

    tuned = compose([*NANO, "lora.rank=2"])
    model = adapted(tuned, build(Architecture.of(tuned)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter += 0.1 if "lora_B" in name else 0.0
    state = {"config": flatten(tuned), "samples": 8}
    checkpoint.save(tmp_path / "run", samples=8, tensors={"model": model.state_dict()}, state=state, keep=1)
    assert run("ckpt=run", "format=adapter", "out=a") == 0
    assert run("ckpt=run", "format=safetensors", "out=s") == 0
    alone = load_file("a/adapter_model.safetensors")
    assert len(alone) == sum("lora_" in name for name in model.state_dict())
    back = load_model("s/model.safetensors")
    assert back.run.lora.rank == 0
    x, text = torch.randn(1, 3, 16, 16), torch.randn(1, 4, 12)
    condition = Condition(text=text, position=model.position_map(full_view(16, 16, batch=1), (4, 4)), aspect=torch.zeros(1))
    with torch.no_grad():
        torch.testing.assert_close(back.model(x, x[:, 0, 0, 0], condition), model(x, x[:, 0, 0, 0], condition), rtol=0, atol=1e-6)
    assert all(torch.equal(back.model.state_dict()[name], tensor) for name, tensor in merged(model).state_dict().items())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["format=diffusers"], "ckpt= is missing"),
        (["ckpt=r"], "format= is missing; choose one of safetensors, diffusers, comfyui, adapter"),
        (["ckpt=r", "format=onnx"], "format=onnx: no such format"),
        (["ckpt=r", "format=comfy"], "did you mean 'comfyui'"),
        (["ckpt=r", "format=comfyui", "dtype=int8"], "dtype=int8: no such dtype"),
        (["ckpt=r", "format=diffusers", "parts=all"], "only format=comfyui takes it"),
        (["ckpt=r", "format=diffusers", "dtyp=fp16"], "did you mean 'dtype'"),
        (["ckpt=r", "format=safetensors", "compare=a cat"], "compare=a cat: only format=diffusers has a pipeline"),
        (["ckpt=r", "format=diffusers", "model.dim=3"], "belongs to the trained run"),
    ],
)
def test_bad_arguments_are_one_line(arguments, words):
    with pytest.raises(HdmError) as caught:
        export.parse(arguments)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["format=adapter"], "has no adapters"),
        (["format=diffusers", "guidance=autoguidance", "guidance.ckpt=run"], "a pipeline holds one"),
        (["format=safetensors", "out=full"], "out=full: exists and is no export"),
        (["format=safetensors", "weights=ema_decay"], "was switched off"),
    ],
)
def test_refusals_are_one_line_and_write_nothing(written, arguments, words, capsys):
    Path("full").mkdir()
    Path("full/mine.txt").write_text("keep")
    assert run(f"ckpt={written()}", *arguments) == 2
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 1
    assert words in err[0]
    assert [path.name for path in Path("full").iterdir()] == ["mine.txt"]


def test_a_file_without_a_header_is_no_checkpoint():
    save_file({"a": torch.zeros(1)}, "x.safetensors")
    with pytest.raises(CheckpointError, match=r"x.safetensors: has no configuration in its header"):
        load_model("x.safetensors")
    with pytest.raises(ConfigError):
        export._loaded(export.parse(["ckpt=x.safetensors", "format=safetensors", "model.dim=3"]))
