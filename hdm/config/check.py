"""Combinations that cannot work, found before anything heavy is imported.

What two variants need and take of each other is data (`hdm.config.compat`); a rule about the values of one variant lives with its
config, as a method `check(self, run: RunConfig) -> None`; the others are here.
"""

import dataclasses
import importlib.util
import math
from typing import Any

from hdm.config import compat
from hdm.config.axes import AXES
from hdm.config.errors import ConfigError
from hdm.config.schema import WIDEST, RunConfig
from hdm.config.stages import check_stages


def check(run: RunConfig) -> None:
    """Raise ConfigError for a configuration that cannot run."""
    _finite(run)
    require(bool(run.captions.separator.strip()), "captions.separator: is empty; set '$$' (the report's) or ','")
    require("/" not in run.name, f"name={run.name}: is part of a folder's name; leave out the slash, out= names the place")
    _ranges(run)
    _model(run)
    _batches(run)
    _averages(run)
    _whole(run)
    check_stages(run)
    _lora(run)
    compat.check(run)
    for axis in AXES:
        if hasattr(getattr(run, axis), "check"):
            getattr(run, axis).check(run)


def require(condition: bool, message: str) -> None:
    """Raise ConfigError with `message` unless `condition`."""
    if not condition:
        raise ConfigError(message)


def _finite(value: Any, key: str = "") -> None:
    """No number anywhere is infinite or NaN."""
    if dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            _finite(getattr(value, field.name), f"{key}.{field.name}" if key else field.name)
    elif isinstance(value, list):
        for item in value:
            _finite(item, key)
    else:
        require(not isinstance(value, float) or math.isfinite(value), f"{key}={value}: must be a finite number")


def _model(run: RunConfig) -> None:
    m = run.model
    require(
        m.heads * m.head_dim == m.dim,
        f"model.dim={m.dim}: is not model.heads x model.head_dim = {m.heads} x {m.head_dim} = {m.heads * m.head_dim};"
        f" set model.heads={m.dim // m.head_dim if m.dim % m.head_dim == 0 else '…'} or change model.head_dim",
    )


def _batches(run: RunConfig) -> None:
    t = run.train
    require(
        t.batch_size % t.accumulation == 0,
        f"train.accumulation={t.accumulation}: does not divide train.batch_size={t.batch_size}; choose one of"
        f" {', '.join(str(n) for n in range(1, t.batch_size + 1) if t.batch_size % n == 0)}",
    )


def _averages(run: RunConfig) -> None:
    require(
        run.ema.power <= WIDEST,
        f"ema.power={run.ema.power}: no power-function average is that wide; set 0.28 or less (EDM2 uses 0.05 to 0.15), 0 for none",
    )
    widths = run.ema.snapshot_powers
    require(
        len(set(widths)) == len(widths) >= 2 and all(0.01 <= width <= WIDEST for width in widths),
        f"ema.snapshot_powers=[{','.join(f'{width:g}' for width in widths)}]: must be two different widths or more, each from 0.01"
        " to 0.28 (EDM2 stores 0.05 and 0.1); ema.snapshot_every=0 switches snapshots off",
    )


def _whole(run: RunConfig) -> None:
    for axis in AXES.values() if run.validation.whole else ():
        config = getattr(run, axis.name)
        needs = getattr(config, "needs", {})
        require(
            "square" not in needs,
            f"validation.whole=true: shows images of any aspect ratio, and {axis.name}={axis.of(config).name} needs square batches"
            f" ({needs.get('square')}); set validation.whole=false",
        )


def _lora(run: RunConfig) -> None:
    lora = run.lora
    require(lora.rank >= 0, f"lora.rank={lora.rank}: must be 0, for no adapters, or above")
    require(lora.alpha is None or lora.alpha > 0, f"lora.alpha={lora.alpha}: must be above 0")
    require(lora.factor >= 1, f"lora.factor={lora.factor}: must be 1 or above; 4 is usual")
    if lora.rank == 0:
        return
    require(
        importlib.util.find_spec("peft") is not None,
        f"lora.rank={lora.rank}: the package peft is not installed; pip install 'hdm-lab[lora]', or set lora.rank=0",
    )
    rule = getattr(getattr(run.optimizer, "rule", None), "name", "")
    require(
        rule != "mup" and not hasattr(run.optimizer, "hidden_lr"),
        f"lora.rank={lora.rank}: the rate of an adapter follows from its fan-in; use optimizer=adamw optimizer.rule=mup_report",
    )


_POSITIVE = """
    model.dim model.mlp_dim model.heads model.head_dim model.depth model.enc_blocks model.dec_blocks model.patch
    train.batch_size train.accumulation train.log_every train.validate_every train.sample_every train.checkpoint_every
    train.keep_checkpoints train.milestone_every parallel.timeout validation.samples validation.timesteps validation.batch_size
    sampling.batch_size eval.samples
    hardware.devices budget.steps budget.samples budget.flops budget.seconds
""".split()
_NOT_NEGATIVE = """
    model.pre_depth model.post_depth train.clip train.workers sampling.grid ema.power ema.snapshot_every eval.every
    eval.bootstrap seed
""".split()
_FRACTIONS = "captions.tag_dropout captions.group_dropout captions.text_dropout ema.decay hardware.utilisation".split()


def _ranges(run: RunConfig) -> None:
    infinity = float("inf")
    for keys, low, high, words in (
        (_POSITIVE, 1e-12, infinity, "above 0"),
        (_NOT_NEGATIVE, 0, infinity, "0 or above"),
        (_FRACTIONS, 0, 1, "between 0 and 1"),
    ):
        for key in keys:
            value: Any = run
            for name in key.split("."):
                value = getattr(value, name)
            require(value is None or low <= value <= high, f"{key}={value}: must be {words}")
