"""Weights that are missing, damaged, pickled or bring code along; and the way through a hub, spoken to over HTTP."""

import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from hdm.conditioning.weights import Source
from hdm.config.axes import AUTOENCODER, TEXT_ENCODER, discover
from hdm.config.errors import AssetError

discover()
REPOSITORY = Path(__file__).parents[2]


def build(axis, name, **fields):
    return axis.build(axis.get(name).config(**fields), cache=Path("cache"), device="cpu")


@pytest.fixture
def folder(tiny, tmp_path):
    """A copy of the tiny Qwen3, to be damaged."""
    return Path(shutil.copytree(tiny("qwen3").folder, tmp_path / "qwen3"))


class Marker:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


# --- folders ----------------------------------------------------------------------------------------------------------


def refused(path, axis=TEXT_ENCODER, name="qwen3"):
    """The message with which `path` is refused."""
    with pytest.raises(AssetError) as caught:
        build(axis, name, path=str(path))
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


def test_pickled_weights_are_not_opened(folder, tmp_path):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Marker(tmp_path / "unpickled")))
    assert "safetensors" in refused(folder)
    vae = tmp_path / "vae"
    vae.mkdir()
    (vae / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    (vae / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps(Marker(tmp_path / "unpickled")))
    assert "safetensors" in refused(vae, AUTOENCODER, "kl")
    assert not (tmp_path / "unpickled").exists()
    pickle.loads((vae / "diffusion_pytorch_model.bin").read_bytes()).close()
    assert (tmp_path / "unpickled").exists(), "the marker works"


def test_code_that_comes_with_weights_is_not_run(folder, tmp_path):
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\nclass EvilConfig: ...\nclass Evil: ...\n")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.EvilConfig", "AutoModel": "evil.Evil"}}
    (folder / "config.json").write_text(json.dumps(config))
    refused(folder)
    assert not (tmp_path / "executed").exists()


def test_truncated_weights_are_refused(folder):
    file = folder / "model.safetensors"
    os.truncate(file, file.stat().st_size // 2)
    assert "cannot be loaded" in refused(folder)


def test_weights_with_a_hole_are_refused(folder):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert "lacks 1 weights of AutoModel, such as layers.1.mlp.up_proj.weight" in refused(folder)


def test_a_folder_without_a_tokenizer_is_refused(folder):
    for file in folder.glob("tokenizer*"):
        file.unlink()
    assert "has no tokenizer" in refused(folder)


def test_an_empty_folder_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty")
    refused(tmp_path / "empty", AUTOENCODER, "kl")


def test_a_path_that_is_neither_folder_nor_hub_id():
    with pytest.raises(AssetError, match=r"text_encoder.path=/no/such/folder: no such folder; give one with config.json"):
        build(TEXT_ENCODER, "qwen3", path="/no/such/folder")
    with pytest.raises(AssetError, match=r"autoencoder.path=: no such folder"):
        Source(axis="autoencoder", path="").load(lambda path, **options: None)


# --- the hub ----------------------------------------------------------------------------------------------------------

NAME, COMMIT = "someone/tiny-qwen3", "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """The few answers of a model hub that a download needs, for one repository that is a folder."""

    protocol_version = "HTTP/1.1"

    def __init__(self, folder, log, *args):
        self.folder, self.log = folder, log
        super().__init__(*args)

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        self.log.append(self.path)
        files = {
            f"/{NAME}/resolve/{COMMIT if 'resolve/' + COMMIT in self.path else 'main'}/{f.name}": f for f in self.folder.iterdir()
        }
        path = self.path.partition("?")[0]
        if path in files:
            self.answer(200, files[path].read_bytes(), ETag=f'"{files[path].name}"')
        elif path.startswith(f"/api/models/{NAME}"):
            info = {"id": NAME, "sha": COMMIT, "siblings": [{"rfilename": f.name} for f in self.folder.iterdir()]}
            is_list = "/tree/" in path
            self.answer(200, json.dumps([] if is_list else info).encode())
        else:
            kind = "EntryNotFound" if path.startswith(f"/{NAME}/") else "RepoNotFound"
            self.answer(404, b"{}", **{"X-Error-Code": kind})

    def answer(self, status, body, **headers):
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(body)), "X-Repo-Commit": COMMIT} | headers).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(tiny):
    """(address, log of requests) of a hub with one repository."""
    log = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, tiny("qwen3").folder, log))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", log
    server.shutdown()
    server.server_close()


BUILD = """
import sys, time
from pathlib import Path
from hdm.config.axes import TEXT_ENCODER, discover
from hdm.config.errors import AssetError
discover()
import transformers
start = time.monotonic()
try:
    config = TEXT_ENCODER.get("qwen3").config(path=sys.argv[1], width=32, max_length=16)
    states, mask = TEXT_ENCODER.build(config, cache=Path("cache")).encode(["a cat", ""])
    print("states", tuple(states.shape))
except AssetError as error:
    print("refused", round(time.monotonic() - start, 1), error)
"""


def build_elsewhere(address, home, path=NAME, **environment):
    """What a process with its own hub cache prints."""
    # a proxy of this machine has no business between two of its own processes
    base = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and not k.lower().endswith("_proxy")}
    done = subprocess.run(
        [sys.executable, "-c", BUILD, path],
        env=base | {"HF_ENDPOINT": address, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"} | environment,
        cwd=REPOSITORY, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_weights_are_fetched_once_and_then_need_no_network(hub, tmp_path):
    address, log = hub
    assert build_elsewhere(address, tmp_path).startswith("states (2, ")
    assert any(path.endswith("model.safetensors") for path in log)
    log.clear()
    assert build_elsewhere(address, tmp_path).startswith("states (2, ")
    assert log == []


def test_a_repository_that_the_hub_does_not_have(hub, tmp_path):
    said = build_elsewhere(hub[0], tmp_path, path="someone/misspelt")
    assert said.startswith("refused")
    assert "RepositoryNotFoundError" in said


def test_without_a_network_the_answer_comes_at_once(tmp_path):
    said = build_elsewhere("http://127.0.0.1:9", tmp_path)
    kind, seconds, message = said.split(" ", 2)
    assert kind == "refused"
    assert float(seconds) < 15, "the library's own retries take 23 s and more"
    assert f"text_encoder.path={NAME}: not in the hub cache ({tmp_path / 'hub'})" in message
    assert f"run `hf download {NAME}`" in message
    assert "text_encoder.path=FOLDER" in message
    assert "\n" not in message


def test_offline_mode_is_obeyed(hub, tmp_path):
    address, log = hub
    assert "OfflineModeIsEnabled" in build_elsewhere(address, tmp_path, HF_HUB_OFFLINE="1")
    assert log == []
