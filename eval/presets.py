"""Protocols by name, as data: `protocol=fast_1k` stands for these lines, which lines of the command line overrule.

A preset fixes how images are drawn, what they are compared with and how many there are. What it leaves open is the network,
and the extractor, which a machine has or has not and which is part of a metric's name.
"""

from dataclasses import dataclass

from hdm.config.errors import ConfigError, suggest

_DRAWN = ("sampler=euler", "guidance=cfg", "guidance.scale=3.0", "eval.seed=0", "eval.repeat=true")


@dataclass(kw_only=True, slots=True, frozen=True)
class Preset:
    """What it is for, the lines, and how many prompts the val split must have."""

    purpose: str
    lines: tuple[str, ...]
    prompts: int = 0


PRESETS: dict[str, Preset] = {
    "fast_1k": Preset(
        purpose="to rank arms while they train: 1,000 images, 20 steps; read KID",
        lines=(*_DRAWN, "sampler.steps=20", "eval.samples=1000"),
    ),
    "paper_10k": Preset(
        purpose="10,000 images, 50 steps, against the val split",
        lines=(*_DRAWN, "sampler.steps=50", "eval.samples=10000"),
    ),
    "paper_50k": Preset(
        purpose="50,000 images, 50 steps, against the training split, as class-conditional papers do",
        lines=(*_DRAWN, "sampler.steps=50", "eval.samples=50000", "eval.reference=train"),
    ),
    "coco30k": Preset(
        purpose="one image for each of 30,000 captions of COCO's val2014, 50 steps; give that set as the run's data",
        lines=(*_DRAWN, "sampler.steps=50", "eval.samples=30000", "eval.repeat=false"),
        prompts=30000,
    ),
}


def lines(name: str) -> list[str]:
    """The lines of preset `name`. Raises ConfigError for an unknown one."""
    if name not in PRESETS:
        raise ConfigError(f"protocol={name}: no such preset{suggest(name, PRESETS)} (options: {', '.join(PRESETS)})")
    return list(PRESETS[name].lines)
