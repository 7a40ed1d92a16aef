"""The model card: what a person must know who meets the weights without the run folder."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hdm.config.axes import AXES, DATA
from hdm.config.compose import flatten
from hdm.config.errors import HdmError
from hdm.config.schema import RunConfig
from hdm.track import events
from hdm.train.checkpoint import Loaded, name_at

_MODEL_AXES = ("merge", "adaln", "norm", "attention", "mlp", "position", "encoding", "routing", "text_fusion")
_TRAINING = ("objective", "timestep", "optimizer", "optimizer.lr", "schedule", "crop", "crop.size", "train.batch_size")


@dataclass(kw_only=True, slots=True)
class Card:
    """README.md of an export. What the run folder does not say is left out, or called not known."""

    loaded: Loaded
    run: RunConfig
    dtype: str
    licence: str | None
    usage: str

    def write(self, out: Path) -> list[Path]:
        """Write README.md and, if the run has drawn any, samples.png into `out`; return their paths."""
        out.mkdir(parents=True, exist_ok=True)
        pictures = sorted((self.loaded.folder / "samples").glob("samples-*.png"))
        picture = [out / "samples.png"] if pictures else []
        if pictures:
            shutil.copyfile(pictures[-1], picture[0])
        path = out / "README.md"
        path.write_text(self.text(pictured=bool(pictures)), encoding="utf-8")
        return [path, *picture]

    def text(self, *, pictured: bool) -> str:
        """The card, with the front matter that model hubs read."""
        run, model = self.run, self.loaded.model
        count = sum(parameter.numel() for parameter in model.parameters())
        front = [f"license: {self.licence or 'unknown'}", "pipeline_tag: text-to-image", "tags: [hdm-lab, flow-matching]"]
        lines = ["---", *front, "---", "", f"# {self.loaded.folder.name}", ""]
        lines += [
            f"A text-to-image network of {count:,} parameters, trained by HDM-Lab: {_name(run, 'backbone')}, {run.model.dim} wide;"
            f" {self.loaded.weights} weights after {self.loaded.samples:,} images, stored as {self.dtype}.",
            "",
        ]
        if pictured:
            lines += ["![samples](samples.png)", "", "Captions that training has not seen.", ""]
        lines += ["## Use", "", self.usage, "## Licences", "", *self.licences(), ""]
        lines += ["## Data", "", *self.data(), "", "## Configuration", "", *self.configuration(), ""]
        lines += ["## Metrics", "", *self.metrics(), "", "## Cost", "", *self.cost(), ""]
        return "\n".join(lines)

    def licences(self) -> list[str]:
        """One line each for weights, code, data and frozen networks."""
        facts = self._facts()
        data = f"{facts['licence']} ({facts.get('licence_url', '')}). {facts.get('attribution', '')}" if "licence" in facts else ""
        lines = [
            f"- Weights: {self.licence or 'not stated; ask who gave them to you'}",
            "- Code: Apache-2.0 (HDM-Lab)",
            f"- Training data: {data or 'not known to HDM-Lab; see its source'}",
        ]
        for axis in ("text_encoder", "autoencoder"):
            config = getattr(self.run, axis)
            if hasattr(config, "path"):
                name = f"{axis.replace('_', ' ').capitalize()} {_name(self.run, axis)}"
                lines.append(f"- {name}{f' ({config.path})' if config.path else ''}: its own licence")
        return lines

    def data(self) -> list[str]:
        """Source, name and digest of what was trained on."""
        facts = self._facts()
        lines = [f"- {facts.get('title', _name(self.run, 'data'))}" + (f", {facts['source']}" if "source" in facts else "")]
        for event in events.read(self.loaded.folder) if self._tracked() else []:
            if event.type == "dataset":
                line = f"- {event.data['context']}: {event.data['name']}, sha256 {event.data['digest']}"
                lines += [line] if line not in lines else []
        return lines

    def configuration(self) -> list[str]:
        """A table of what distinguishes the run; the whole of it is in the files."""
        flat = flatten(self.run)
        sizes = [f"model.{key}" for key in ("dim", "mlp_dim", "heads", "head_dim", "depth", "patch")]
        keys = ["backbone", *sizes, *_MODEL_AXES, "text_encoder", "autoencoder", *_TRAINING, "sampler", "sampler.steps", "guidance"]
        keys += ["guidance.scale", "seed", "init_from", "init_digest"]
        rows = [f"| `{key}` | {flat[key]} |" for key in keys if flat.get(key) not in (None, "")]
        return ["| key | value |", "|---|---|", *rows]

    def metrics(self) -> list[str]:
        """Every number of these weights with the digest of its protocol; the run's own validation loss where it is theirs."""
        rows = []
        for path in sorted((self.loaded.folder / "eval").glob("*.json")):
            report = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(report, dict) or "protocol_digest" not in report:
                continue
            if report["samples"] == self.loaded.samples and report["weights"] == self.loaded.weights:
                rows += [f"| {name} | {value:.5g} | {report['protocol_digest']} |" for name, value in report["metrics"].items()]
        ema = self.run.ema
        averaged = "ema-power" if ema.power else "ema-decay" if ema.decay else "model"
        key = {"model": "val/loss_raw", averaged: "val/loss"}.get(self.loaded.weights)
        if key and self._tracked():
            losses = dict(events.series(events.settled(events.read(self.loaded.folder)), key))
            if self.loaded.samples in losses:
                rows.append(
                    f"| {key} | {losses[self.loaded.samples]:.5g} | unrouted, {self.run.validation.samples} held-out images |"
                )
        if not rows:
            return ["None measured for these weights: `python -m eval.fid`, `python -m eval.clip`."]
        return ["| metric | value | protocol |", "|---|---|---|", *rows, "", "Numbers compare only where protocols are equal."]

    def cost(self) -> list[str]:
        """Samples, hours, FLOPs and dollars up to these weights."""
        lines = [f"- {self.loaded.samples:,} images"]
        try:
            path = self.loaded.folder / "checkpoints" / name_at(self.loaded.samples) / "state.json"
            state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            hours, flops = float(state["device_seconds"]) / 3600, float(state["flops"])
        except (OSError, ValueError, KeyError, TypeError):
            return [*lines, "- hours and FLOPs: not known, the run's checkpoint is not here"]
        hardware = self.run.hardware
        lines += [f"- {hours:.3g} device hours ({hardware.name})", f"- {flops:.3g} FLOPs of the network"]
        price = hardware.dollars_per_hour
        return [
            *lines,
            f"- ${hours * price:,.2f} at ${price} an hour" if price else "- dollars: hardware.dollars_per_hour was not given",
        ]

    def _facts(self) -> dict[str, Any]:
        try:
            facts: dict[str, Any] = DATA.build(self.run.data).facts()
            return facts
        except HdmError:  # a package that the data come from is not installed here
            return {}

    def _tracked(self) -> bool:
        return (self.loaded.folder / events.FILE).is_file()


def _name(run: RunConfig, axis: str) -> str:
    return AXES[axis].of(getattr(run, axis)).name
