"""Which numbers may stand in one column: those that were made in the same way.

Metrics of eval/ carry the digest of their protocol as a tag (`protocol.fid`), and the protocol itself as an artifact. Validation
losses have none: what they depend on besides the network are the held-out images, how many of them at how many timesteps, and the
latent space in which the error is measured.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from hdm.report.record import ArmRecord

VALIDATION = ("validation.samples", "validation.timesteps", "crop.size", "autoencoder")  # and the fields of the autoencoder
_TAG = "protocol."
_MISSING = "nothing"

Reader: TypeAlias = Callable[[str, str], Any]  # (run id, path of a JSON artifact) -> its content or None


def differences(metric: str, arms: Sequence[ArmRecord], read: Reader) -> list[str]:
    """What sets the protocols of `metric` apart in the finished arms that have it, one line per field; [] when nothing does."""
    measured = [arm for arm in arms if arm.finished and metric in arm.metrics]
    if metric.startswith("val/"):
        return _fields({arm.label: _validation(arm) for arm in measured})
    kinds = dict.fromkeys(key.removeprefix(_TAG) for arm in measured for key in arm.tags if key.startswith(_TAG))
    for kind in kinds:
        digests: dict[str, ArmRecord] = {}
        for arm in measured:
            digests.setdefault(arm.tags.get(_TAG + kind, _MISSING), arm)
        if len(digests) < 2:
            continue
        contents = {arm.label: read(arm.run_id, f"eval/{kind}.json") or {} for arm in digests.values()}
        owned = [content for content in contents.values() if metric in content.get("metrics", {metric: 0})]
        if owned:  # else it is a number of another kind of evaluation
            protocols = {label: flat(content.get("protocol", {})) for label, content in contents.items()}
            named = ", ".join(f"{digest} in {arm.label}" for digest, arm in digests.items())
            return _fields(protocols) or [f"protocol: {named}"]
    return []


def flat(nested: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """{"sampler.steps": "16"} from {"sampler": {"steps": 16}}."""
    found: dict[str, str] = {}
    for key, value in nested.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": str(value)}
    return found


def _validation(arm: ArmRecord) -> dict[str, str]:
    wanted = {key: value for key, value in arm.params.items() if key in VALIDATION or key.startswith("autoencoder.")}
    return wanted | {"held-out images": arm.datasets.get("validation", _MISSING).rpartition(" ")[2]}


def _fields(protocols: Mapping[str, Mapping[str, str]]) -> list[str]:
    """One line for every field that is not the same everywhere: `sampler.steps: 16 in merge=cross seed=0, 32 in …`."""
    lines = []
    for key in dict.fromkeys(key for protocol in protocols.values() for key in protocol):
        values: dict[str, str] = {}
        for label, protocol in protocols.items():
            values.setdefault(protocol.get(key, _MISSING), label)
        if len(values) > 1:
            lines.append(f"{key}: " + ", ".join(f"{value} in {label}" for value, label in values.items()))
    return lines
