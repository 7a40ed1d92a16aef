"""The protocol of a number: all that it depends on besides the weights. Only numbers of equal protocols stand in one column.

Metrics are written as `eval/METRIC….json` below a run folder, each with its protocol and the eight-digit digest of it. Here are the
parts that need neither the images nor torch: the digest, what differs between two protocols, and the refusal to mix them.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hdm.config.errors import HdmError

_SHOWN = 4  # differing fields in a message


@dataclass(kw_only=True, slots=True, frozen=True)
class Number:
    """A measured value; `error` is the standard error over the drawn samples (not over training seeds), None where unknown."""

    value: float
    error: float | None
    digest: str
    protocol: dict[str, Any]


def digest(protocol: Mapping[str, Any]) -> str:
    """Eight hex digits."""
    return hashlib.blake2b(json.dumps(protocol, sort_keys=True).encode(), digest_size=4).hexdigest()


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """The fields in which two protocols differ, such as `sampler.steps: 16 and 32`; [] for equal ones."""
    left, right = dict(_leaves(a)), dict(_leaves(b))
    return [
        f"{key}: {_shown(left, key)} and {_shown(right, key)}"
        for key in dict.fromkeys([*left, *right])
        if (key in left) != (key in right) or left.get(key) != right.get(key)
    ]


def require_equal(protocols: Mapping[str, Mapping[str, Any]], *, metric: str) -> None:
    """Raise HdmError, naming the first two that differ and how, unless all of `protocols` (by the name of a run) are equal."""
    names = list(protocols)
    for other in names[1:]:
        if found := differences(protocols[names[0]], protocols[other]):
            more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
            raise HdmError(
                f"{metric}: {names[0]} ({digest(protocols[names[0]])}) and {other} ({digest(protocols[other])}) were measured under"
                f" different protocols and are not compared: {'; '.join(found[:_SHOWN])}{more}; evaluate both alike"
            )


def reports(folder: Path) -> dict[str, Number]:
    """The numbers of a run folder under its own protocol and of its newest weights, by metric such as `kid/efficientnet`.

    A file that cannot be read is passed over: it is written whole or not at all, so it is not one of ours.
    """
    found: dict[str, Number] = {}
    for path in sorted((Path(folder) / "eval").glob("*.json")):
        if "." in path.stem:  # METRIC.PROTOCOL[.SAMPLES].json: another protocol, or older weights
            continue
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            errors = content.get("sampling_errors", {})
            for name, value in content["metrics"].items():
                found[name] = Number(
                    value=value, error=errors.get(name), digest=content["protocol_digest"], protocol=content["protocol"]
                )
        except (OSError, ValueError, KeyError, AttributeError):
            continue
    return found


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for name, part in value.items():
            yield from _leaves(part, f"{key}.{name}" if key else str(name))
    elif isinstance(value, Sequence) and not isinstance(value, str):
        yield key, list(value)
    else:
        yield key, value


def _shown(leaves: Mapping[str, Any], key: str) -> str:
    return str(leaves[key])[:60] if key in leaves else "nothing"
