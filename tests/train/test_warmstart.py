"""Training from given weights: what is loaded, which run that is, and what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from squares import NANO, Listener

from hdm.config.compose import compose, flatten
from hdm.config.errors import CheckpointError, ConfigError
from hdm.config.identity import run_name
from hdm.model import Architecture, build, published
from hdm.train import single
from hdm.train.checkpoint import load_model
from hdm.train.loop import train
from hdm.train.warmstart import fill


@pytest.fixture
def source(nano, listener, tmp_path):
    """A run folder whose average is not its raw weights, and not the initial ones."""
    train(nano("ema.decay=0.5", "ema.power=0.25", "budget.steps=3", "seed=5"), tmp_path / "source", listener)
    return tmp_path / "source"


def checkpoint(folder, samples):
    return folder / "checkpoints" / f"samples-{samples:09d}"


def stored(folder, stem, samples=12):
    return load_file(checkpoint(folder, samples) / f"{stem}.safetensors")


def initial(run, folder):
    """The weights and the average that the run begins with."""
    train(run, folder, Listener())
    return stored(folder, "model", 0), stored(folder, "ema-power", 0)


@pytest.mark.parametrize(("weights", "stem"), [("ema", "ema-power"), ("raw", "model"), ("ema_decay", "ema-decay")])
def test_weights_and_averages_begin_with_those_of_the_source(source, nano, tmp_path, weights, stem):
    run = nano(f"init_from={source}", f"init_weights={weights}", "budget.steps=1")
    begun, average = initial(run, tmp_path / "tuned")
    expected = stored(source, stem)
    assert begun.keys() == expected.keys() == average.keys()
    for name, tensor in expected.items():
        assert torch.equal(begun[name], tensor), name
        assert torch.equal(average[name], tensor), name
    assert not any(name.endswith("exp_avg") for name in stored(tmp_path / "tuned", "optimizer", 0))


def test_the_digest_of_the_weights_is_part_of_the_run(source, nano, tmp_path):
    """Equal weights under another path are the same run; other weights under the same path are not."""
    plain, ema, raw = nano(), nano(f"init_from={source}"), nano(f"init_from={source}", "init_weights=raw")
    assert len({run_name(run) for run in (plain, ema, raw)}) == 3
    shutil.copytree(source, tmp_path / "copy")
    assert run_name(nano(f"init_from={tmp_path / 'copy'}")) == run_name(ema)
    shutil.rmtree(checkpoint(tmp_path / "copy", 12))
    assert run_name(nano(f"init_from={tmp_path / 'copy'}")) != run_name(ema)
    state = json.loads((checkpoint(source, 12) / "state.json").read_text())
    assert state["files"]["ema-power.safetensors"]["sha256"].startswith(ema.init_digest)


def test_what_is_off_is_no_part_of_the_run(nano):
    assert run_name(nano()) == run_name(nano("init_strict=false", "init_weights=raw", "lora.factor=8"))


def test_a_run_goes_on_without_its_source(source, nano, listener, tmp_path):
    """20 steps are 11 and 9, also when the weights that it began with are gone."""
    run = nano(f"init_from={source}", "budget.steps=6", "train.checkpoint_every=12", "ema.decay=0.5")
    train(run, tmp_path / "whole", listener)
    shutil.copytree(tmp_path / "whole", tmp_path / "broken")
    shutil.rmtree(checkpoint(tmp_path / "broken", 24))
    shutil.rmtree(source)
    train(run, tmp_path / "broken", listener)
    for stem in ("model", "ema-power", "ema-decay", "optimizer"):
        whole, again = (stored(tmp_path / name, stem, 24) for name in ("whole", "broken"))
        assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())


@pytest.mark.parametrize("adapters", [[], ["lora.rank=2", "optimizer.lr=2.0"]], ids=["whole", "lora"])
def test_fine_tuning_in_stages(source, nano, listener, tmp_path, adapters):
    """The first stage begins with the source's weights, each later one with those of the stage before, also when resumed."""
    stages = [
        "budget.steps=null", "train.keep_checkpoints=9", "train.checkpoint_every=8",
        "stages.a.steps=3", "stages.a.crop.size=16", "stages.b.steps=3", "stages.b.crop.size=20", "stages.b.train.batch_size=8",
        "stages.c.steps=2", "stages.c.optimizer.lr=1e-30", "stages.c.optimizer.weight_decay=0",
    ]  # fmt: skip
    run = nano(f"init_from={source}", *adapters, *stages)
    train(run, tmp_path / "whole", listener)
    begun, expected = stored(tmp_path / "whole", "model", 0), stored(source, "ema-power")
    plain = {name.replace(".base_layer", ""): tensor for name, tensor in begun.items() if ".lora_" not in name}
    assert all(torch.equal(plain[name], tensor) for name, tensor in expected.items())
    assert len(plain) == len(expected)
    a, b, c = (stored(tmp_path / "whole", "model", samples) for samples in (12, 36, 44))
    trained = {name for name in begun if not adapters or ".lora_" in name}
    assert all(not torch.equal(a[name], begun[name]) and not torch.equal(b[name], a[name]) for name in trained)
    assert all(torch.equal(c[name], tensor) for name, tensor in b.items())

    shutil.copytree(tmp_path / "whole", tmp_path / "broken")  # as if killed in the second stage
    for samples in (36, 40, 44):
        shutil.rmtree(checkpoint(tmp_path / "broken", samples))
    shutil.rmtree(source)
    train(run, tmp_path / "broken", listener)
    assert listener.rewound == [12, 36, 28, 36]  # each stage begins with a checkpoint
    for stem in ("model", "ema-power", "optimizer"):
        whole, again = (stored(tmp_path / name, stem, 44) for name in ("whole", "broken"))
        assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())


def test_a_stage_has_no_source_of_its_own(nano):
    with pytest.raises(ConfigError, match=r"stages\.b\.init_from=x: is the same in all stages; set init_from for the whole run"):
        nano("budget.steps=null", "stages.a.steps=1", "stages.b.steps=1", "stages.b.init_from=x")


def test_every_form_of_the_source_gives_the_same_network(source, nano):
    """Run folder, checkpoint, exported file."""
    loaded = load_model(source)
    file = source / "exported.safetensors"
    single.write(file, loaded.model.state_dict(), single.metadata(loaded.run, samples=12, weights="ema-power"))
    for form in (source, checkpoint(source, 12), file):
        run = nano(f"init_from={form}")
        model = build(Architecture.of(run), seed=3)
        fill(run, model)
        assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in stored(source, "ema-power").items())


def test_the_published_layout_is_trained_on(nano, listener, tmp_path):
    lines = ["preset=xut_upstream", "model=nano", "model.dim=16", "model.mlp_dim=32", "model.heads=2", "model.head_dim=8"]
    run = nano(*lines)
    expected = build(Architecture.of(run), seed=9).state_dict()
    save_file(published.to_published(expected, prefix="unet.model."), "published.safetensors")
    begun, _ = initial(nano(*lines, "init_from=published.safetensors", "budget.steps=1"), tmp_path / "tuned")
    assert all(torch.equal(begun[name], tensor) for name, tensor in expected.items())
    with pytest.raises(
        ConfigError, match=r"init_from=published.safetensors: the published layout cannot say .*preset=xut_upstream"
    ):
        train(nano("init_from=published.safetensors"), tmp_path / "other", listener)


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (["merge=add"], "was trained with merge=cross, and this run has merge=add; give the run merge=cross"),
        (["model.heads=1", "model.head_dim=16"], "was trained with model.heads=2 model.head_dim=8"),  # of equal shapes
        (["position=bbox"], "was trained with position=rect1"),
        (["text_encoder.width=24"], "was trained with text_encoder.width=12"),
    ],
)
def test_another_network_is_refused_in_one_line(source, nano, lines, words):
    run = nano(f"init_from={source}", *lines)
    with pytest.raises(ConfigError) as caught:
        fill(run, build(Architecture.of(run)))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_fits_is_loaded_when_asked(source, nano, capsys):
    run = nano(f"init_from={source}", "init_strict=false", "merge=concat")
    model = build(Architecture.of(run), seed=3)
    fresh = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fill(run, model)
    there = stored(source, "ema-power")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, there.get(name, fresh[name])), name
    out = capsys.readouterr().out
    assert "keep their initial values: decoder.0.0.merge." in out
    assert "are left in the file: decoder.0.0.merge_norm.weight" in out or "decoder.0.0.merge.attn" in out


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: None, "no such file or folder"),
        (lambda: Path("x").mkdir(), "holds no complete checkpoint"),
        (lambda: Path("x.safetensors").write_bytes(b"abc"), "not readable as safetensors"),
        (lambda: Path("x.pt").write_bytes(b"abc"), "is no .safetensors"),
        (lambda: save_file({"a": torch.zeros(1)}, "x.safetensors"), "has no tensor 'patch.proj.weight'"),
    ],
)
def test_what_is_no_source_is_one_line(make, words, shards):
    make()
    name = next((str(p) for p in Path().glob("x*")), "x")

    def attempt():
        run = compose([*NANO, f"init_from={name}"])
        fill(run, build(Architecture.of(run)))

    with pytest.raises((ConfigError, CheckpointError)) as caught:
        attempt()
    assert f"init_from={name}" in str(caught.value)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_average_that_was_switched_off(nano, listener, tmp_path):
    train(nano("ema.decay=0", "budget.steps=1"), tmp_path / "run", listener)
    with pytest.raises(ConfigError, match=r"init_weights=ema_decay: .* was switched off"):
        nano(f"init_from={tmp_path / 'run'}", "init_weights=ema_decay")


def test_weights_that_changed_since_the_run_was_named(source, nano):
    run = nano(f"init_from={source}")
    shutil.rmtree(checkpoint(source, 12))
    with pytest.raises(ConfigError, match="its weights have changed since this run was named"):
        fill(run, build(Architecture.of(run)))


def test_the_digest_survives_the_flat_form(source, nano):
    from hdm.config.compose import from_flat

    run = nano(f"init_from={source}")
    flat = flatten(run)
    shutil.rmtree(source)
    assert from_flat(flat).init_digest == run.init_digest
