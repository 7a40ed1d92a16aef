"""A real sweep on a real server, as people look at it: saved view, pictures, champion, report, with the run folders gone.
With HDM_SCREENSHOTS=FOLDER the browser leaves there what it saw."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from recording import Server

sys.path.insert(0, str(Path(__file__).parents[1] / "train"))
from squares import NANO, write_tar

from hdm.config.lines import REPOSITORY
from hdm.launch.champion import ALIAS
from hdm.track.uri import connect

pytestmark = [pytest.mark.browser, pytest.mark.slow, pytest.mark.timeout(1500)]

ARGUMENTS = [
    *NANO,
    "experiment=none",
    "sampling.grid=4",
    "sampler.steps=2",
    "train.log_every=4",
    "train.validate_every=8",
    "eval.metrics=[]",
]
ASKED = ["merge=cross,concat", "seeds=3", "parallel=2", "budget.steps=6", "track.experiment=squares", "--open"]
BROWSER = "#!{python}\nimport sys\nopen({path!r}, 'w').write(sys.argv[1])\n"
IMAGES = "return [...document.querySelectorAll('img')].filter(i => i.src.includes('get-artifact') && i.naturalWidth > 0).length"


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """(server, the command's output, the address that --open opened) of two arms with three seeds, the run folders gone."""
    folder = tmp_path_factory.mktemp("squares")
    write_tar(folder / "shards" / "train.tar", 16)
    write_tar(folder / "shards" / "val.tar", 4)
    person = folder / "browser"
    person.write_text(BROWSER.format(python=sys.executable, path=str(folder / "opened")))
    person.chmod(0o755)
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "BROWSER": f"{person} %s"}
    server = Server(folder / "server").start()
    try:
        command = [sys.executable, "-m", "hdm.sweep", *ARGUMENTS, *ASKED, f"track.uri={server.uri}"]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stdout + done.stderr
        opened = (folder / "opened").read_text()
        shutil.rmtree(folder / "runs")
        yield server, done.stdout, opened
    finally:
        server.stop()


def look(browser, address, *words, name=""):
    """The page's text once it holds `words`."""
    browser.get("about:blank")  # addresses differ behind the #, which alone loads nothing
    browser.get(address)
    deadline = time.monotonic() + 120
    while not all(word in (text := browser.find_element("tag name", "body").text) for word in words):
        if time.monotonic() > deadline:
            keep(browser, f"{name}-failed")
            raise AssertionError(text)
        time.sleep(0.5)
    return text


def keep(browser, name):
    if folder := os.environ.get("HDM_SCREENSHOTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        browser.save_screenshot(f"{folder}/{name}.png")


def wait_for(browser, script, least):
    deadline = time.monotonic() + 90
    while (value := browser.execute_script(script)) < least:
        assert time.monotonic() < deadline, value
        time.sleep(0.5)


def test_open_shows_the_settings_averaged_over_seeds_with_curves(browser, sweep):
    _, output, opened = sweep
    assert f"MLflow: {opened}" in output
    assert "viewStateShareKey=" in opened
    words = ("merge=cross", "merge=concat", "Group by: hdm.setting.merge-seed-", "overview", "curves", "6 matching runs")
    text = look(browser, opened, *words, name="view")
    assert "You're viewing a shared view" in text
    wait_for(browser, "return document.querySelectorAll('.js-plotly-plot').length", 2)
    keep(browser, "view")


def test_the_runs_of_the_sweep_are_a_table_with_short_names(browser, sweep):
    _, _, opened = sweep
    address = opened.replace("compareRunsMode=CHART", "compareRunsMode=TABLE")
    names = [f"merge={merge} seed={seed}" for merge in ("cross", "concat") for seed in range(3)]
    look(browser, address, *names, "Duration", "val/loss", name="table")
    keep(browser, "table")


def test_the_pictures_are_a_table_of_captions_and_settings(browser, sweep):
    _, output, _ = sweep
    (address,) = re.findall(r"^pictures: (\S+)$", output, re.MULTILINE)
    look(browser, address, "prompt", "merge=cross", "merge=concat", "red square, small", name="pictures")
    wait_for(browser, IMAGES, 8)
    keep(browser, "pictures")


def test_the_champion_is_the_best_run_of_the_best_setting(browser, sweep):
    server, output, _ = sweep
    ((name, version, label),) = re.findall(rf"^champion: models:/(\S+)@{ALIAS} is version (\d+), (.+)$", output, re.MULTILINE)
    client = connect(server.uri)
    crowned = client.get_model_version_by_alias(name, ALIAS)
    assert (str(crowned.version), client.get_run(crowned.run_id).info.run_name) == (version, label)
    (experiment,) = {client.get_run(crowned.run_id).info.experiment_id}
    runs = client.search_runs([experiment], f"tags.`hdm.sweep.{name}` = 'arm'")
    losses = {}
    for run in runs:
        losses.setdefault(run.data.params["merge"], {})[run.info.run_id] = run.data.metrics["val/loss"]
    best = min(losses.values(), key=lambda values: sum(values.values()))
    assert crowned.run_id == min(best, key=best.get)
    assert crowned.tags["verdict"] in ("the baseline", "cannot reach p < 0.05 with 3 seeds; 6 can")
    look(browser, f"{server.uri}/#/models/{name}/versions/{version}", name, ALIAS, name="champion")
    keep(browser, "champion")


def test_a_report_is_made_from_the_server_alone(browser, sweep, tmp_path):
    server, output, _ = sweep
    (name,) = re.findall(r"models:/(\S+)@", output)
    command = [sys.executable, "-m", "hdm.report", f"sweep={name}", f"uri={server.uri}"]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "annot reach p < 0.05 with 3 seeds; 6 can" in done.stdout
    folder = tmp_path / "reports" / name
    latex = (folder / "tables.tex").read_text()
    assert r"\toprule" in latex and "merge=concat" in latex
    for figure in ("differences", "curves"):
        assert (folder / "figures" / f"{figure}.svg").read_text().lstrip().startswith("<?xml")
        assert (folder / "figures" / f"{figure}.png").read_bytes().startswith(b"\x89PNG")
    html = (folder / "index.html").read_text()
    assert html.count("<img") == 4 * 2 * 3  # four captions, two settings, three seeds
    assert "6 arms, 6 finished" in html and "red square, small" in html
    assert f"python -m hdm.sweep {shlex.join(ARGUMENTS[:1])}" in html
    client = connect(server.uri)
    (parent,) = client.search_runs([client.get_experiment_by_name("squares").experiment_id], f"tags.`hdm.sweep.{name}` = 'sweep'")
    sheet = json.loads(Path(client.download_artifacts(parent.info.run_id, "sweep.json", str(tmp_path))).read_text())
    assert [arm["seed"] for arm in sheet["arms"]] == [0, 1, 2, 0, 1, 2]
    assert Path(client.download_artifacts(parent.info.run_id, "report/index.html", str(tmp_path))).read_text() == html
    look(browser, (folder / "index.html").as_uri(), "merge=concat", "red square, small", name="report")
    keep(browser, "report")
