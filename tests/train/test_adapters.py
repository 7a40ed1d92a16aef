"""Adapters: what is trained, at which rates, from which values, and what becomes of them."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from hdm.config.compose import compose
from hdm.config.errors import ConfigError
from hdm.model import Architecture, Condition, build, full_view
from hdm.train.adapters import adapted, merged, save_adapter, targets
from hdm.train.checkpoint import load_model
from hdm.train.loop import train
from hdm.train.optimizer import rates

LORA = ["lora.rank=2"]
LOKR = ["lora.rank=2", "lora.kind=lokr", "lora.factor=4"]
BACKBONES = ["xut", "uvit", "hdit", "dit", "mmdit", "sana"]


def stored(folder, samples, stem="model"):
    return load_file(folder / "checkpoints" / f"samples-{samples:09d}" / f"{stem}.safetensors")


@pytest.mark.parametrize("lines", [LORA, LOKR], ids=["lora", "lokr"])
def test_only_adapters_are_trained(nano, listener, tmp_path, lines):
    run = nano(*lines, "budget.steps=3", "ema.decay=0.5")
    train(run, tmp_path / "run", listener)
    before, after, average = (stored(tmp_path / "run", *key) for key in ((0,), (12,), (12, "ema-power")))
    plain = build(Architecture.of(run), seed=run.seed).state_dict()
    for name, tensor in after.items():
        if "lora_" in name or "lokr_" in name:
            assert not torch.equal(tensor, before[name]), name
        else:  # the frozen network, to the bit, in the average too
            assert torch.equal(tensor, plain[name.replace(".base_layer", "")]), name
            assert torch.equal(average[name], tensor), name
    moments = stored(tmp_path / "run", 12, "optimizer")
    assert moments
    assert all("lora_" in name or "lokr_" in name for name in moments)


@pytest.mark.parametrize("lines", [LORA, LOKR], ids=["lora", "lokr"])
def test_training_begins_at_the_frozen_network(nano, lines):
    run = nano(*lines)
    plain, model = (build(Architecture.of(run), seed=run.seed) for _ in range(2))
    inside = merged(adapted(run, model)).state_dict()
    assert inside.keys() == plain.state_dict().keys()
    assert all(torch.equal(inside[name], tensor) for name, tensor in plain.state_dict().items())


def test_a_resumed_run_is_the_uninterrupted_one(nano, listener, tmp_path):
    run = nano(*LORA, "budget.steps=4", "train.checkpoint_every=8")
    train(run, tmp_path / "whole", listener)
    stop = nano(*LORA, "budget.steps=4", "train.checkpoint_every=8")
    train(stop, tmp_path / "again", listener)
    import shutil

    shutil.rmtree(tmp_path / "again" / "checkpoints" / "samples-000000016")
    train(run, tmp_path / "again", listener)
    for stem in ("model", "ema-power", "optimizer"):
        whole, again = (stored(tmp_path / name, 16, stem) for name in ("whole", "again"))
        assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())


def filled(run, seed=1):
    """The adapted network of `run` with no adapter at zero."""
    model = adapted(run, build(Architecture.of(run), seed=run.seed))
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn(parameter.shape, generator=draw)
    return model


@pytest.mark.parametrize("lines", [LORA, LOKR, [*LORA, "lora.alpha=3"]], ids="+".join)
def test_merged_and_unmerged_networks_predict_the_same(nano, lines):
    run = nano(*lines)
    model = filled(run)
    with torch.no_grad():
        model.out.proj.weight.normal_(generator=torch.Generator().manual_seed(2), std=0.02)  # which begins near zero
    draw = torch.Generator().manual_seed(3)
    x, t = torch.randn(2, 3, 16, 16, generator=draw), torch.tensor([0.2, 0.7])
    text = torch.randn(2, 5, 12, generator=draw)
    condition = Condition(text=text, position=model.position_map(full_view(16, 16, batch=2), (4, 4)), aspect=torch.zeros(2))
    with torch.no_grad():
        frozen = build(Architecture.of(run), seed=run.seed)
        frozen.out.load_state_dict(model.out.state_dict())
        without, apart = frozen(x, t, condition), model(x, t, condition)
        together = merged(model)(x, t, condition)
    assert (apart - without).abs().max() > 1e-2  # the adapters say something
    assert apart.abs().max() < 2
    torch.testing.assert_close(together, apart, rtol=0, atol=1e-6)


@pytest.mark.parametrize("alpha", [None, 3.0])
def test_merged_weights_are_w_plus_b_a(nano, alpha):
    """W + (alpha / rank) B A, in float64 from the parts."""
    run = nano(*LORA, *([] if alpha is None else [f"lora.alpha={alpha}"]))
    model = filled(run)
    parts = {name: tensor.double() for name, tensor in model.state_dict().items()}
    layers = targets(run, build(Architecture.of(run), seed=None))
    state = merged(model).state_dict()
    assert layers
    for name in layers:
        a, b = parts[f"{name}.lora_A.default.weight"], parts[f"{name}.lora_B.default.weight"]
        expected = parts[f"{name}.base_layer.weight"] + (1.0 if alpha is None else alpha / 2) * b @ a
        torch.testing.assert_close(state[f"{name}.weight"].double(), expected, rtol=0, atol=1e-6)


def test_merged_lokr_is_w_plus_a_kronecker_product(nano):
    run = nano(*LOKR)
    model = filled(run)
    parts = {name: tensor.double() for name, tensor in model.state_dict().items()}
    layers = targets(run, build(Architecture.of(run), seed=None))
    state = merged(model).state_dict()
    for name in layers:
        left, right = parts[f"{name}.lokr_w1.default"], parts.get(f"{name}.lokr_w2.default")
        if right is None:
            right = parts[f"{name}.lokr_w2_a.default"] @ parts[f"{name}.lokr_w2_b.default"]
        expected = parts[f"{name}.base_layer.weight"] + torch.kron(left, right)
        torch.testing.assert_close(state[f"{name}.weight"].double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_backbone_takes_adapters(backbone):
    run = compose([f"backbone={backbone}", "model=nano", "model.depth=3", *LORA])
    plain = build(Architecture.of(run), seed=None)
    model = adapted(run, build(Architecture.of(run), seed=None))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained
    assert all(".lora_" in name for name in trained)
    assert merged(model).state_dict().keys() == plain.state_dict().keys()


def test_a_trained_checkpoint_loads_merged(nano, listener, tmp_path):
    train(nano(*LORA, "budget.steps=3", "optimizer.lr=2.0"), tmp_path / "run", listener)
    loaded = load_model(tmp_path / "run", weights="raw")
    assert not [name for name, _ in loaded.model.named_parameters() if "lora" in name]
    parts = stored(tmp_path / "run", 12)
    name = "pre.0.attn.qkv"
    update = parts[f"{name}.lora_B.default.weight"] @ parts[f"{name}.lora_A.default.weight"]
    assert update.abs().max() > 1e-3
    torch.testing.assert_close(loaded.model.state_dict()[f"{name}.weight"], parts[f"{name}.base_layer.weight"] + update)
    again = nano(f"init_from={tmp_path / 'run'}", "init_weights=raw")  # and is a source like any other
    model = build(Architecture.of(again))
    from hdm.train.warmstart import fill

    fill(again, model)
    assert torch.equal(model.pre[0].attn.qkv.weight, loaded.model.pre[0].attn.qkv.weight)


def test_peft_reads_the_adapter_file(nano, tmp_path):
    """peft's own reader puts the file onto the frozen network, which then is the merged one."""
    run = nano(*LORA)
    model = filled(run)
    save_adapter(model, run, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 2, 2)
    import peft

    base = build(Architecture.of(run), seed=run.seed)
    read = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    expected, got = merged(model).state_dict(), read.merge_and_unload().state_dict()
    assert expected.keys() == got.keys()
    assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())


def test_rates_are_those_of_the_fan_in(nano):
    """lr / d_in for A, lr / rank for B: the rule of every other tensor (spec 1.4)."""
    run = nano(*LORA, "optimizer.lr=0.6")
    rate = rates(run.optimizer, adapted(run, build(Architecture.of(run), seed=None)))
    assert rate["pre.0.attn.qkv.lora_A.default.weight"] == pytest.approx(0.6 / 16)
    assert rate["pre.0.mlp.w3.lora_A.default.weight"] == pytest.approx(0.6 / 32)
    assert rate["pre.0.mlp.w3.lora_B.default.weight"] == pytest.approx(0.6 / 2)


@pytest.mark.parametrize("width", [64, 256])
@pytest.mark.parametrize("rank", [4, 16])
def test_a_step_moves_the_output_alike_at_any_width_and_rank(width, rank):
    """The law behind the rates: B's first Adam step moves (B A) x by about what a step of W moves W x, sqrt(1/3) of it at most."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(width, generator=draw)
    a = (torch.rand(rank, width, generator=draw) * 2 - 1) / math.sqrt(width)
    moved = (1 / rank) * (a @ x).abs().sum()  # every entry of B moves by lr / rank, with the sign that helps
    whole = (1 / width) * x.abs().sum()
    assert 0.4 < moved / whole < 0.9


def test_targets_by_the_end_of_their_names(nano):
    run = nano(*LORA, "lora.targets=[attn.qkv,w3]")
    found = targets(run, build(Architecture.of(run), seed=None))
    assert {name.rpartition(".")[2] for name in found} == {"qkv", "w3"}
    with pytest.raises(
        ConfigError, match=r"no linear layer of the blocks ends in 'qkw' \(there are attn.kv, attn.out, attn.q, attn.qkv"
    ):
        adapted(nano(*LORA, "lora.targets=[qkw]"), build(Architecture.of(run), seed=None))


def test_the_output_layer_is_no_target_unless_it_is_in_a_block(nano):
    run = nano(*LORA, "lora.targets=[out]")
    model = adapted(run, build(Architecture.of(run), seed=None))
    assert isinstance(model.out.proj, nn.Linear)
    assert not hasattr(model.out.proj, "base_layer")


@pytest.mark.parametrize(
    ("lines", "rate"),
    [
        ([], 0.5),
        (["lora.rank=4"], 0.0),
        (["routing.rate=0.25", "lora.rank=4"], 0.25),  # a line of one's own, in any order
        (["lora.rank=4", "routing.rate=0.25"], 0.25),
        (["lora.rank=0"], 0.5),
        (["routing=deferred_mask", "lora.rank=4"], 0.75),
    ],
)
def test_adapters_do_not_route_unless_asked(lines, rate):
    assert compose(["model=nano", *lines]).routing.rate == rate


def test_adapters_beside_an_experiment_do_not_route():
    assert compose(["experiment=openmoji_nano", "lora.rank=4"]).routing.rate == 0.0
    assert not hasattr(compose(["model=nano", "routing=none", "lora.rank=4"]).routing, "rate")


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (["lora.rank=-1"], "lora.rank=-1: must be 0"),
        (["lora.rank=4", "lora.alpha=0"], "lora.alpha=0.0: must be above 0"),
        (["lora.rank=4", "lora.factor=0"], "lora.factor=0"),
        (["lora.rank=4", "optimizer.rule=mup"], "use optimizer=adamw optimizer.rule=mup_report"),
        (["lora.rank=4", "optimizer=muon"], "use optimizer=adamw optimizer.rule=mup_report"),
    ],
)
def test_refusals(lines, words):
    with pytest.raises(ConfigError) as caught:
        compose(["model=nano", *lines])
    assert words in str(caught.value)


def test_without_peft(monkeypatch):
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "peft" else found(name))
    with pytest.raises(ConfigError, match=r"lora.rank=4: the package peft is not installed; pip install"):
        compose(["model=nano", "lora.rank=4"])
