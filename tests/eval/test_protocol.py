"""The digest of a protocol: different for everything that moves a number, the same for everything else."""

import json

import pytest

from eval.protocol import digest, sampling_protocol, versions
from hdm.config.compose import compose

FACTS = {"weights": "ema-power", "samples": 256, "size": (32, 32), "prompts": "p", "reference": "r"}


def of(*overrides, **facts):
    return digest(sampling_protocol(compose(["experiment=openmoji_nano", *overrides]), **{**FACTS, **facts}))


@pytest.mark.parametrize(
    "override",
    [
        "sampler.steps=7", "sampler.time_shift=2", "guidance=none", "guidance=routed", "guidance.scale=2", "eval.seed=1",
        "train.precision=fp32",
    ],
)  # fmt: skip
def test_what_changes_images_changes_the_digest(override):
    assert of(override) != of()


@pytest.mark.parametrize("fact", [{"weights": "model"}, {"samples": 255}, {"size": (32, 64)}, {"prompts": "q"}, {"reference": "s"}])
def test_what_is_compared_changes_the_digest(fact):
    assert of(**fact) != of()


def test_every_part_of_a_protocol_counts():
    whole = {"metric": "fid", "extractor": {"name": "a", "weights": "b"}, "kid": {"kid_subsets": 1}, "versions": {"torch": "2"}}
    seen = {digest(whole)}
    for key, value in whole.items():
        changed = {**whole, key: "other"} if isinstance(value, str) else {**whole, key: {**value, next(iter(value)): "other"}}
        seen.add(digest(changed))
    assert len(seen) == 1 + len(whole)


@pytest.mark.parametrize(
    "override", ["device=cpu", "sampling.batch_size=3", "track.uri=off", "merge=concat", "seed=5", "cache=elsewhere"]
)
def test_what_does_not_move_a_number_and_what_is_compared_between_arms_leave_it(override):
    assert of(override) == of()


def test_it_is_plain_data():
    protocol = sampling_protocol(compose(["experiment=openmoji_nano", "guidance=routed"]), **FACTS)
    assert json.loads(json.dumps(protocol)) == protocol
    assert protocol["guidance"] == {"name": "routed", "scale": 3.0, "rate_cond": 0.0, "rate_uncond": 0.5, "captions": "strong"}


def test_another_network_counts_by_its_weights_not_by_its_folder():
    of_folder = {f: ["guidance=autoguidance", f"guidance.ckpt={f}"] for f in ("a", "b")}
    assert of(*of_folder["a"], weak="1234") == of(*of_folder["b"], weak="1234")
    assert of(*of_folder["a"], weak="1234") != of(*of_folder["a"], weak="5678")
    protocol = sampling_protocol(compose(["experiment=openmoji_nano", *of_folder["a"]]), **FACTS, weak="1234")
    assert protocol["guidance"] == {"name": "autoguidance", "ckpt": "1234", "weights": "ema", "scale": 2.1, "captions": "both"}


def test_versions_leave_the_build_out():
    assert "+" not in versions(["torch"])["torch"]
