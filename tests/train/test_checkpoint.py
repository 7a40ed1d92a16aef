import json
import os
import resource
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from hdm.config.errors import CheckpointError, ConfigError
from hdm.train.checkpoint import damage, latest, load_model, save
from hdm.train.loop import train


def write(folder, samples, *, keep=2, size=1000):
    tensors = {"model": {"a": torch.full((size,), float(samples)), "b": torch.zeros(2, 3)}}
    return save(folder, samples=samples, tensors=tensors, state={"samples": samples}, keep=keep)


def names(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


@contextmanager
def file_size_limit(size):
    """Files of this process cannot grow beyond `size` bytes: writing fails as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# --- writing ----------------------------------------------------------------------------------------------------------


def test_the_first_and_the_newest_are_kept(tmp_path):
    for samples in (0, 10, 20, 30, 1_000_000_000):
        path = write(tmp_path, samples)
    assert names(tmp_path) == ["samples-000000000", "samples-000000030", "samples-1000000000"]
    assert latest(tmp_path) == path


def test_nothing_is_left_beside_a_checkpoint_and_all_can_read_it(tmp_path):
    (tmp_path / "checkpoints" / ".samples-000000010.partial").mkdir(parents=True)
    path = write(tmp_path, 10)
    assert names(tmp_path) == ["samples-000000010"]
    assert {oct(file.stat().st_mode & 0o444) for file in path.iterdir()} == {"0o444"}


def test_a_full_disk_leaves_the_earlier_checkpoint(tmp_path):
    good = write(tmp_path, 10)
    with file_size_limit(100_000), pytest.raises(CheckpointError) as error:
        write(tmp_path, 20, size=100_000)
    assert "samples-000000020: cannot be saved: File too large; it needs 0 MB" in str(error.value)
    assert "continues from samples-000000010" in str(error.value)
    assert "\n" not in str(error.value)
    assert names(tmp_path) == ["samples-000000010"]
    assert latest(tmp_path) == good


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("mount") is None, reason="needs root to mount a small disk")
def test_a_truly_full_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(disk)], capture_output=True, check=False).returncode:
        pytest.skip("no right to mount")
    try:
        good = write(disk, 10)
        with pytest.raises(CheckpointError, match="No space left on device; it needs 1 MB"):
            write(disk, 20, size=250_000)
        tensors = {"model": {"a": torch.zeros(100)}}
        with pytest.raises(CheckpointError, match="No space left on device"):
            save(disk, samples=20, tensors=tensors, state={"big": "x" * 1_000_000}, keep=2)
        assert names(disk) == ["samples-000000010"]
        assert latest(disk) == good
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_process_that_dies_while_it_writes_leaves_the_one_before(tmp_path):
    """SIGKILL, as a power loss, when the first file of a checkpoint of 100 MB is on its way."""
    program = "from test_checkpoint import Path, write\nwrite(Path(), 10)\nwrite(Path(), 20, size=25_000_000)"
    here = Path(__file__).parent
    writer = subprocess.Popen(
        [sys.executable, "-c", program], cwd=tmp_path, env={**os.environ, "PYTHONPATH": f"{here}:{here.parents[1]}"}
    )
    partial = tmp_path / "checkpoints" / ".samples-000000020.partial"
    while not (partial / "model.safetensors").exists():
        assert writer.poll() is None
        time.sleep(0.001)
    writer.kill()
    writer.wait()
    assert not (partial / "state.json").exists()
    assert latest(tmp_path).name == "samples-000000010"
    write(tmp_path, 20)
    assert names(tmp_path) == ["samples-000000010", "samples-000000020"]


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "checkpoints").write_text("in the way")
    with pytest.raises(CheckpointError, match="continues from the beginning"):
        write(tmp_path, 10)


# --- damage -----------------------------------------------------------------------------------------------------------


def truncate(path):
    with (path / "model.safetensors").open("r+b") as file:
        file.truncate(2000)


def flip(path):
    with (path / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\xff")


def half_a_state(path):
    text = (path / "state.json").read_text()
    (path / "state.json").write_text(text[: len(text) // 2])


DAMAGES = {
    truncate: "model.safetensors has 2,000 bytes instead of",
    flip: "model.safetensors has other contents",
    half_a_state: "state.json is not readable",
    lambda path: (path / "state.json").unlink(): "state.json is missing",
    lambda path: (path / "model.safetensors").unlink(): "model.safetensors is missing",
    lambda path: (path / "state.json").write_text('{"format": 99}'): "state.json is not of format 1",
}


@pytest.mark.parametrize(("hurt", "words"), DAMAGES.items())
def test_a_damaged_checkpoint_is_recognised_and_the_one_before_taken(tmp_path, capsys, hurt, words):
    good, bad = write(tmp_path, 10), write(tmp_path, 20)
    assert damage(bad) is None
    hurt(bad)
    assert words in damage(bad)
    assert latest(tmp_path) == good
    assert f"warning: {bad} is damaged ({words}" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match=r"(damaged|neither a run folder)"):
        load_model(bad)


def test_a_damaged_one_is_replaced_and_never_pushes_out_a_good_one(tmp_path):
    write(tmp_path, 10)
    truncate(write(tmp_path, 30))
    again = write(tmp_path, 20, keep=1)
    assert names(tmp_path) == [again.name]
    truncate(again)
    assert latest(tmp_path) is None
    assert damage(write(tmp_path, 20)) is None


def test_there_may_be_none(tmp_path):
    assert latest(tmp_path) is None


# --- loading ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def trained(nano, listener, tmp_path):
    return train(nano("budget.steps=3"), tmp_path / "run", listener)


def test_load_model_of_a_run_and_of_a_checkpoint(trained, tmp_path):
    whole = load_model(tmp_path / "run")
    one = load_model(str(trained.checkpoint))
    first = load_model(tmp_path / "run" / "checkpoints" / "samples-000000000", weights="raw")
    assert (whole.samples, one.samples, first.samples) == (12, 12, 0)
    assert whole.folder == one.folder == first.folder == tmp_path / "run"
    assert whole.run.model.dim == 16
    assert not whole.model.training
    for (name, a), b in zip(whole.model.named_parameters(), one.model.parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize(("weights", "stem"), [("ema", "ema-power"), ("raw", "model"), ("ema_decay", "ema-decay")])
def test_the_weights_are_those_of_the_file(trained, weights, stem):
    from safetensors.torch import load_file

    loaded = load_model(trained.checkpoint, weights=weights)
    stored = load_file(trained.checkpoint / f"{stem}.safetensors")
    assert loaded.weights == stem
    assert all(torch.equal(stored[name], tensor) for name, tensor in loaded.model.state_dict().items())


def test_without_averages_ema_means_raw(nano, listener, tmp_path):
    result = train(nano("budget.steps=1", "ema.power=0", "ema.decay=0"), tmp_path / "run", listener)
    assert load_model(result.checkpoint).weights == "model"
    with pytest.raises(CheckpointError, match=r"has no ema-decay\.safetensors, that average was switched off"):
        load_model(result.checkpoint, weights="ema_decay")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ({"model.dim": 32, "model.heads": 4}, r"has shape \(.*16.*\) there and \(.*32.*\) in the network"),
        ({"model.post_depth": 2}, "has no tensor 'post.1."),
        ({"model.post_depth": 0}, "holds tensor 'post.0."),
        ({"merge": "mystery"}, "its configuration is not one of this version: merge=mystery"),
    ],
)
def test_a_checkpoint_of_another_architecture(trained, override, words):
    state = json.loads((trained.checkpoint / "state.json").read_text())
    state["config"] = {
        key: value for key, value in state["config"].items() if not ("merge" in override and key.startswith("merge."))
    }
    state["config"].update(override)
    (trained.checkpoint / "state.json").write_text(json.dumps(state))
    with pytest.raises(CheckpointError, match=words) as error:
        load_model(trained.checkpoint)
    assert "\n" not in str(error.value)


def test_a_state_that_says_too_little(trained, nano, listener, tmp_path):
    path = trained.checkpoint / "state.json"
    state = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in state.items() if key not in ("config", "skipped")}))
    with pytest.raises(CheckpointError, match=r"state\.json does not say 'config'; use another checkpoint"):
        load_model(tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"state\.json does not say 'skipped'"):
        train(nano("budget.steps=4"), tmp_path / "run", listener)
    path.write_text('{"format": 1}')
    assert damage(trained.checkpoint) == "state.json does not say 'files'; use another checkpoint"
    assert latest(tmp_path / "run").name == "samples-000000000"


def test_paths_and_names_that_are_not_there(trained, tmp_path):
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"ckpt=.*nowhere: no such folder"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="holds no complete checkpoint"):
        load_model(tmp_path / "empty")
    with pytest.raises(CheckpointError, match="is neither a run folder nor a checkpoint"):
        load_model(tmp_path / "shards")
    with pytest.raises(CheckpointError, match="has no configuration in its header"):
        load_model(trained.checkpoint / "model.safetensors")
    with pytest.raises(ConfigError, match=r"weights=best: no such weights \(options: ema, raw, ema_decay, ema:WIDTH\)"):
        load_model(trained.checkpoint, weights="best")
