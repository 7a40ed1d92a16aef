"""Every command answers --help and bad input quickly, in words, with the right exit code."""

import os
import subprocess
import sys
import time

import pytest

from hdm.config.compose import compose
from hdm.config.lines import REPOSITORY

COMMANDS = [
    "hdm.run",
    "hdm.sweep",
    "hdm.sample",
    "hdm.prepare",
    "hdm.sync",
    "hdm.variants",
    "hdm.coordcheck",
    "hdm.export",
    "hdm.ema",
    "hdm.cache",
    "hdm.transfer",
    "hdm.report",
    "eval.fid",
    "eval.clip",
    "eval.all",
    "eval.camera",
    "eval.gallery",
]


def run(*arguments, **kwargs):
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        **kwargs,
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_usage(command):
    started = time.process_time()
    done = run(command, "--help")
    assert done.returncode == 0, done.stderr
    assert f"usage: python -m {command}" in done.stdout
    assert time.process_time() - started < 5


@pytest.mark.parametrize("command", COMMANDS)
def test_help_and_errors_import_no_torch(command):
    code = f"""
import runpy, sys
sys.argv = [{command!r}, *{{arguments}}]
try:
    runpy.run_module({command!r}, run_name="__main__")
except SystemExit as stop:
    assert stop.code == {{code}}, stop.code
assert "torch" not in sys.modules
"""
    for arguments, expected in ((["--help"], 0), (["merge=no_such_merge", "ckpt=x"], 2)):
        if command == "hdm.variants" and expected:
            arguments = ["no_such_axis"]
        done = subprocess.run(
            [sys.executable, "-c", code.format(arguments=arguments, code=expected)],
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        )
        assert done.returncode == 0, done.stderr
        if expected:
            assert done.stderr.startswith("error: ")
            assert done.stderr.count("\n") == 1


def test_variants_lists_axes_fields_and_bare_names():
    assert "merge" in run("hdm.variants").stdout
    page = run("hdm.variants", "routing").stdout
    assert "routing=tread" in page
    assert "routing.rate" in page
    assert "openmoji_nano" in page
    names = run("hdm.variants", "merge", "--names").stdout.split()
    assert {"cross", "concat", "add", "weighted_add", "gated", "none"} <= set(names)


@pytest.mark.parametrize("columns", ["80", "200"])
def test_listed_defaults_are_what_one_would_type(columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    page = run("hdm.variants", "keys").stdout.partition("\nstages=")[0]
    assert max(map(len, page.splitlines())) <= int(columns)
    typed = [line.strip().split("  ")[0] for line in page.splitlines() if line.startswith("  ") and line[2] != " "]
    assert "eval.metrics=[fid,clip]" in typed
    assert "model.gradient_checkpointing=false" in typed
    assert compose(typed) == compose([])


def test_experiments_page_says_what_and_why(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    page = run("hdm.variants", "experiments").stdout
    assert "experiment=openmoji_nano\n  The quick start" in page
    assert "\n  text_encoder.dtype=bf16\n" in page
    assert "\n  stages.1024px.crop.size=1024\n" in page


def test_print_config_is_what_one_would_type():
    printed = run("hdm.run", "merge=concat", "--print-config").stdout.splitlines()
    assert "merge=concat" in printed
    assert "eval.metrics=[fid,clip]" in printed
    again = run("hdm.run", *printed, "--print-config")
    assert again.stdout.splitlines() == printed, again.stderr
