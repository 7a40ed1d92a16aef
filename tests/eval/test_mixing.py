"""Numbers of different protocols are refused, by name and field; references travel as files; presets are data."""

import json

import numpy as np
import pytest
import torch

from eval import presets, reference
from eval.extractor import named
from eval.presets import PRESETS
from hdm.config.compose import compose
from hdm.config.errors import ConfigError, DataError, HdmError
from hdm.config.schema import EvalConfig
from hdm.track.protocol import differences, digest, reports, require_equal

FID = {"metric": "fid", "samples": 256, "sampler": {"name": "euler", "steps": 32}, "ema": 0.1}


def test_equal_protocols_do_not_differ_in_any_order_of_their_keys():
    other = dict(reversed(FID.items()))
    assert differences(FID, other) == []
    assert digest(FID) == digest(other)
    require_equal({"a": FID, "b": other}, metric="fid")


def test_what_differs_is_named():
    other = {**FID, "sampler": {"name": "euler", "steps": 16}, "ema": None, "seed": 1}
    assert differences(FID, other) == ["sampler.steps: 32 and 16", "ema: 0.1 and None", "seed: nothing and 1"]
    with pytest.raises(HdmError) as caught:
        require_equal({"one": FID, "same": FID, "two": other}, metric="kid/efficientnet")
    message = str(caught.value)
    assert "\n" not in message
    for words in ("kid/efficientnet", "one", "two", digest(FID), digest(other), "sampler.steps: 32 and 16"):
        assert words in message


def test_reports_of_a_folder_are_those_of_its_own_protocol(tmp_path):
    (tmp_path / "eval").mkdir()
    own = {"metrics": {"fid/x": 3.0, "kid/x": 0.1}, "sampling_errors": {"kid/x": 0.02}, "protocol_digest": "1", "protocol": FID}
    (tmp_path / "eval" / "fid.json").write_text(json.dumps(own))
    (tmp_path / "eval" / "fid.12345678.json").write_text(json.dumps({**own, "metrics": {"fid/x": 9.0}}))
    (tmp_path / "eval" / "clip.json").write_text("{ torn")
    found = reports(tmp_path)
    assert set(found) == {"fid/x", "kid/x"}
    assert (found["fid/x"].value, found["fid/x"].error, found["kid/x"].error) == (3.0, None, 0.02)
    assert reports(tmp_path / "nothing") == {}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_compose_and_fix_how_images_are_drawn(name):
    run = compose(["experiment=openmoji_nano", *presets.lines(name)])
    assert run.eval.samples == int({"fast_1k": 1000, "paper_10k": 10000, "paper_50k": 50000, "coco30k": 30000}[name])
    assert (run.guidance.scale, run.eval.seed) == (3.0, 0)


def test_unknown_preset_is_one_line():
    with pytest.raises(ConfigError, match=r"protocol=fast_k: no such preset; did you mean 'fast_1k'\? \(options: fast_1k, "):
        presets.lines("fast_k")


# --- references as files ----------------------------------------------------------------------------------------------


def extractor(digest="abc"):
    found = named("efficientnet", EvalConfig())
    found.digest = digest
    return found


def test_a_reference_comes_back_from_its_file(tmp_path):
    features = np.random.default_rng(0).standard_normal((20, 8)).astype(np.float32).astype(np.float64)
    reference.save(reference.Reference(features=features, digest="d"), extractor(), tmp_path / "r.safetensors")
    back = reference.load(tmp_path / "r.safetensors", extractor())
    assert np.array_equal(back.features, features)
    assert back.digest == "d"
    from safetensors.numpy import load_file

    arrays = load_file(tmp_path / "r.safetensors")
    np.testing.assert_allclose(arrays["mean"], features.mean(0), rtol=1e-12)
    np.testing.assert_allclose(arrays["covariance"], np.cov(features, rowvar=False), rtol=1e-9)


def test_bad_reference_files_are_one_line(tmp_path):
    path = tmp_path / "r.safetensors"
    reference.save(reference.Reference(features=np.ones((3, 2)), digest="d"), extractor(), path)
    with pytest.raises(DataError, match=r"of another extractor \(weights: abc and xyz\).*eval.features=efficientnet"):
        reference.load(path, extractor(digest="xyz"))
    path.write_bytes(b"no safetensors")
    with pytest.raises(DataError, match=r"cannot be read .*python -m eval.reference"):
        reference.load(path)
    from safetensors.torch import save_file

    save_file({"features": torch.ones(2, 2)}, path)
    with pytest.raises(DataError, match="not a reference of this version"):
        reference.load(path)
