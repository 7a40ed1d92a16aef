"""What a sweep leaves in MLflow for people, in a real database: the saved view or the plain link, the champion, `--open`."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request

import pytest

from hdm.config.lines import REPOSITORY
from hdm.launch import champion, pictures, view
from hdm.launch.ranking import Ranking, Row
from hdm.sweep import parse
from hdm.track import saved_view
from hdm.track.events import EventLog
from hdm.track.mlflow import Shipper
from hdm.track.uri import connect, fragment

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture
def recorded(tmp_path):
    """A sweep of two settings and two seeds that has been sent, and how it was; merge=concat is the better one."""
    sweep = parse(["merge=cross,concat", "seeds=2", f"track.uri=sqlite:///{tmp_path}/mlflow.db"])
    EventLog(sweep.folder).params({"sweep.metric": "val/loss"})
    with Shipper(sweep.folder, uri=sweep.run.track.uri, experiment=sweep.run.track.experiment) as shipper:
        pass
    return sweep, shipper


def ranked(sweep, losses):
    rows = []
    for arm, loss in zip(sweep.arms, losses):
        EventLog(arm.folder).metrics({"val/loss": loss}, 10)
        rows.append(Row(arm=arm, status="finished", metrics={"val/loss": loss, "fid": 1.0}))
    return Ranking(rows, metric="val/loss")


def test_a_view_is_kept_once_and_a_version_that_was_not_tried_gets_the_plain_list(recorded, monkeypatch):
    sweep, shipper = recorded
    ranking = ranked(sweep, [0.5, 0.6, 0.4, 0.3])
    first, second = view.page(sweep, shipper, ranking), view.page(sweep, shipper, ranking)
    assert first == second and set(first) == {"view"}
    uri, experiment, _ = shipper.place
    tags = [key for key in connect(uri).get_experiment(experiment).tags if key.startswith(saved_view.TAG)]
    assert tags == [saved_view.TAG + first["view"]]
    assert f"viewStateShareKey={first['view']}" in fragment(experiment, **first)
    monkeypatch.setattr(saved_view, "TRIED", ("0.1",))
    assert view.page(sweep, shipper, ranking)["search"] == f"tags.`hdm.sweep.{sweep.name}` = 'arm'"


def test_the_champion_is_one_version_a_run_and_moves_when_another_leads(recorded):
    sweep, shipper = recorded
    client = connect(shipper.place[0])

    def crowned():
        version = client.get_model_version_by_alias(sweep.name, champion.ALIAS)
        return version.version, client.get_run(version.run_id).info.run_name, version.tags["setting"]

    lines = champion.crown(sweep, ranked(sweep, [0.5, 0.6, 0.4, 0.3]))
    assert lines == [f"champion: models:/{sweep.name}@champion is version 1, merge=concat seed=1"]
    champion.crown(sweep, ranked(sweep, [0.5, 0.6, 0.4, 0.3]))
    assert crowned() == (1, sweep.arms[3].folder.name, "merge=concat")
    champion.crown(sweep, ranked(sweep, [0.1, 0.2, 0.4, 0.3]))
    assert crowned() == (2, sweep.arms[0].folder.name, "merge=cross")


def test_open_serves_a_database_until_it_is_interrupted(recorded, tmp_path):
    _, shipper = recorded
    person, opened = tmp_path / "browser", tmp_path / "opened"
    person.write_text(f"#!{sys.executable}\nimport sys\nopen({str(opened)!r}, 'w').write(sys.argv[1])\n")
    person.chmod(0o755)
    code = f"from hdm.track.browse import browse; browse({shipper.place[0]!r}, '/#/experiments/1')"
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "BROWSER": f"{person} %s"}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, start_new_session=True)
    deadline = time.monotonic() + 300
    while not (opened.exists() and opened.read_text()):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)
    server, _, page = opened.read_text().partition("/#")
    assert page == "/experiments/1"
    assert urllib.request.urlopen(f"{server}/health", timeout=20).read() == b"OK"
    os.kill(process.pid, signal.SIGINT)
    assert process.wait(60) == 0
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(f"{server}/health", timeout=2)


def test_pictures_are_cut_from_the_grids_of_one_seed(tmp_path):
    import torch
    from PIL import Image

    from hdm.pictures import sheet

    sweep = parse(["merge=cross,concat", "seeds=2", "crop.size=16", "sampling.grid=3", "track.uri=off"])
    sweep.folder.mkdir(parents=True)
    colours = torch.tensor([[200, 0, 0], [0, 200, 0], [0, 0, 200]], dtype=torch.uint8)
    for number, arm in enumerate(sweep.arms[:3]):  # the last one drew nothing
        (arm.folder / "samples").mkdir(parents=True)
        tiles = (colours // (number + 1))[:, :, None, None].expand(3, 3, 16, 16)
        sheet(tiles, ["a", "b", "c"]).save(arm.folder / "samples" / "samples-000000010.png")
        (arm.folder / "samples" / "captions.json").write_text(json.dumps(["a", "b", "c"]))
    paths = pictures.write(ranked(sweep, [0.5, 0.6, 0.4, 0.3]), sweep.folder)
    table = json.loads((sweep.folder / pictures.FILE).read_text())
    assert table["columns"] == ["prompt", "merge=cross", "merge=concat"]
    assert [row[0] for row in table["data"]] == ["a", "b", "c"]
    assert len(paths) == 3 * 2 + 1
    with Image.open(sweep.folder / table["data"][1][2]["filepath"]) as image:
        assert image.size == (128, 128)
        assert image.getpixel((64, 64)) == (0, 200 // 3, 0)  # the second caption of seed 0 of merge=concat, the third arm
