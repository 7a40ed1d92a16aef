"""Shape checks on, one thread per worker, no hub: set before anything of the laboratory is imported."""

import os
import signal

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

from jaxtyping import install_import_hook

# Annotated shapes are checked at every call under pytest, and only there.
install_import_hook(["hdm.model", "hdm.diffusion", "hdm.conditioning"], "beartype.beartype")

import pytest
import torch


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    """Runs, databases and data sets of a test stay in its own folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


# Jobs that a shell starts in the background inherit an ignored SIGINT; what tests interrupt would then run on.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items):
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def pytest_terminal_summary(terminalreporter):
    """How many pairs of variants tests/contract held to the contract; xdist's workers send the numbers along."""
    found = [dict(report.user_properties) for report in terminalreporter.stats.get("passed", []) if report.when == "call"]
    if pairs := sum(properties.get("pairs", 0) for properties in found):
        refused = sum(properties.get("refused", 0) for properties in found)
        terminalreporter.write_line(f"contract: {pairs} pairs of variants train, {refused} are refused")
