"""Sweeps with known numbers, recorded as a run records itself and sent to a server as a run is."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from eval.protocol import digest
from hdm.pictures import sheet
from hdm.track.events import EventLog
from hdm.track.replay import sync

CAPTIONS = ["red apple, fruit", "pickup truck, vehicle", "a <b>bold</b> face & more", "crescent moon, sky, night"]


@dataclass(kw_only=True)
class Synthetic:
    """What to make up: settings by label with the true difference of each from the first."""

    name: str
    settings: dict[str, float]
    seeds: list[int]
    spread: float = 0.01
    recorded: bool = True
    sheet: dict = field(default_factory=dict)
    params: dict = field(default_factory=dict)
    own: dict = field(default_factory=dict)  # setting -> its parameters
    status: dict = field(default_factory=dict)  # (setting, seed) -> status; None: no run
    value: dict = field(default_factory=dict)  # (setting, seed) -> the metric
    protocol: dict = field(default_factory=dict)  # setting -> protocol of fid
    pictures: bool = True
    captions: bool = True


def record(sweep: Synthetic, folder: Path, uri: str) -> None:
    """Record every arm and the sweep's own run below `folder` and send them to `uri`."""
    keys = dict.fromkeys(token.partition("=")[0] for label in sweep.settings for token in label.split() if "=" in token)
    axes = {
        key: list(dict.fromkeys(v for s in sweep.settings for k, _, v in (t.partition("=") for t in s.split()) if k == key))
        for key in keys
    }
    parent = EventLog(folder / "sweeps" / sweep.name)
    parent.params({f"sweep.{key}": ", ".join(values) for key, values in axes.items()})
    parent.params(
        {"sweep.metric": "val/loss", "sweep.direction": "minimize", "sweep.arms": "1", "sweep.fixed": "", "track.name": sweep.name}
    )
    parent.tags({f"hdm.sweep.{sweep.name}": "sweep", "mlflow.source.name": f"python -m hdm.sweep {' '.join(sweep.settings)}"})
    environment = {
        "python": "3.11.9",
        "packages": {"torch": "2.13.0", "numpy": "2.4.6"},
        "cpu": {"name": "a processor", "cores": 2},
        "gpus": [],
    }
    (parent.folder / "environment.json").write_text(json.dumps(environment))
    parent.artifact(parent.folder / "environment.json")
    arms = [(setting, seed) for setting in sweep.settings for seed in sweep.seeds]
    if sweep.recorded:
        entries = [{"label": f"{s} seed={i}", "setting": s, "seed": i, "run": run_name(s, i), "overrides": []} for s, i in arms]
        content = {
            "format": 1, "name": sweep.name, "command": f"python -m hdm.sweep sweep={sweep.name}", "axes": axes, "fixed": [],
            "seeds": sweep.seeds, "budget": {"samples": 400}, "metric": "val/loss", "direction": "minimize", "baseline": None,
            "confirmatory": True, "alpha": 0.05, "noise_floor": None, "sampler": "grid", "pruner": None, "arms": entries,
        } | sweep.sheet  # fmt: skip
        (parent.folder / "sweep.json").write_text(json.dumps(content))
        parent.artifact(parent.folder / "sweep.json")
    parent.status("finished")
    sync(parent.folder, uri=uri, experiment="lab")
    for setting, seed in arms:
        if sweep.status.get((setting, seed), "finished") is not None:
            _arm(sweep, setting, seed, folder)
            sync(folder / run_name(setting, seed), uri=uri, experiment="lab")


def run_name(setting: str, seed: int) -> str:
    return f"run-s{seed}-{sum(map(ord, setting)):08x}"


def truth(sweep: Synthetic, setting: str, seed: int) -> float:
    """The metric of one arm: a part that the seed shares over all settings, the setting's effect, and noise of its own."""
    if (setting, seed) in sweep.value:
        return sweep.value[setting, seed]
    shared = np.random.default_rng([1, seed]).normal(0.5, 0.01)
    own = np.random.default_rng([2, seed, *map(ord, setting)]).normal(0, sweep.spread)
    return float(shared + sweep.settings[setting] + own)


def _arm(sweep: Synthetic, setting: str, seed: int, folder: Path) -> None:
    log = EventLog(folder / run_name(setting, seed))
    log.tags({f"hdm.sweep.{sweep.name}": "arm", "mlflow.source.git.commit": "0123456789abcdef", "hdm.git.dirty": "false"})
    point = dict(token.split("=", 1) for token in setting.split() if "=" in token)
    log.params(
        {
            "seed": seed, "model.dim": 64, "budget.samples": 400, "budget.steps": None, "matched": "", "validation.samples": 64,
            "validation.timesteps": 8, "crop.size": 16, "autoencoder": "pixel", "sampling.grid": 16, "track.experiment": "lab",
            "track.name": f"{setting} seed={seed}", "track.parent": f"sweeps/{sweep.name}", "out": str(folder),
        } | point | sweep.params | sweep.own.get(setting, {})
    )  # fmt: skip
    log.dataset("tiny", "feedc0ffee", "train")
    log.dataset("tiny", "deadbeef", "validation")
    status = sweep.status.get((setting, seed), "finished")
    last = truth(sweep, setting, seed)
    number = list(sweep.settings).index(setting)
    for samples in range(0, 401, 100):
        values = {"val/loss": last + 0.5 * (1 - samples / 400) ** 2} if np.isfinite(last) or samples < 400 else {"val/loss": last}
        log.metrics(values | {"val/loss_raw": last + 0.02}, samples)
    log.metrics({"cost/seconds": 20.0 + number, "cost/flops": 1e12 * (1 + number / 10), "train/loss": 0.1}, 400)
    log.metrics({"model/parameters": 27744.0 + 100 * number}, None)
    if protocol := sweep.protocol.get(setting):
        path = log.folder / "eval" / "fid.json"
        path.parent.mkdir()
        path.write_text(json.dumps({"metrics": {"kid/efficientnet": 0.1}, "protocol": protocol}))
        log.metrics({"kid/efficientnet": 0.1 + number / 100}, None)
        log.tags({"protocol.fid": digest(protocol)})
        log.artifact(path)
    if sweep.pictures:
        _pictures(sweep, log, number, seed)
    log.status(status, "it broke" if status == "failed" else "")
    log.close()


def _pictures(sweep: Synthetic, log: EventLog, number: int, seed: int) -> None:
    images = torch.zeros(len(CAPTIONS), 3, 16, 16, dtype=torch.uint8)
    for i in range(len(CAPTIONS)):
        images[i] = tile(number, seed, i)
    path = log.folder / "samples" / "samples-000000400.png"
    path.parent.mkdir(exist_ok=True)
    sheet(images, CAPTIONS).save(path)
    log.image("samples/grid", path, 400)
    if sweep.captions:
        (path.parent / "captions.json").write_text(json.dumps(CAPTIONS))
        log.artifact(path.parent / "captions.json")


def tile(number: int, seed: int, caption: int) -> torch.Tensor:
    """The picture of one arm and caption: a disc in a colour of its own."""
    y, x = torch.meshgrid(torch.arange(16), torch.arange(16), indexing="ij")
    inside = ((y - 8) ** 2 + (x - 4 - 2 * caption) ** 2 < 30).to(torch.uint8)
    colour = torch.tensor([40 * number % 256, 60 * caption % 256, 90 * seed % 256], dtype=torch.uint8)
    return colour[:, None, None] * inside + 230 * (1 - inside)
