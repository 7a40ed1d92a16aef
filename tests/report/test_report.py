"""The command against a real database."""

import shutil
from pathlib import Path

import pytest
from synthetic import Synthetic, record

from hdm import cli
from hdm.config.errors import ConfigError, HdmError
from hdm.report import __main__ as report
from hdm.report.build import _noise
from hdm.report.store import Store


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Two sweeps in one database; the run folders are gone. One has a sweep.json, an arm that failed and one that did not start."""
    folder = tmp_path_factory.mktemp("lab")
    uri = f"sqlite:///{folder}/mlflow.db"
    own = {("merge=concat", 2): "failed", ("merge=concat", 3): None}
    full = Synthetic(name="merge-1", settings={"merge=cross": 0.0, "merge=concat": -0.05}, seeds=[0, 1, 2, 3], status=own)
    full.protocol = {"merge=cross": {"sampler": {"steps": 8}}, "merge=concat": {"sampler": {"steps": 16}}}
    record(full, folder / "runs", uri)
    old = Synthetic(name="old-1", settings={"merge=add": 0.0}, seeds=[0, 1], recorded=False, captions=False)
    record(old, folder / "runs", uri)
    shutil.rmtree(folder / "runs")
    return uri


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()}


def test_a_page_is_made_and_kept_from_mlflow_alone_and_again_to_the_byte(server, capsys):
    report.command(["sweep=merge-1", f"uri={server}", "out=first"])
    report.command(["sweep=merge-1", f"uri={server}", "out=second", "--no-log"])
    out = capsys.readouterr().out
    assert "Cannot reach p < 0.05 with 2 seeds; 6 can." in out
    assert "first/index.html" in out
    made = files("first")
    assert made == files("second")
    names = {str(name) for name in made}
    assert {"index.html", "report.md", "tables.tex", "table-results.md", "figures/differences.svg", "figures/curves.png"} <= names
    html = made[Path("index.html")].decode()
    assert "1 of 8 arms failed: merge=concat seed=2 (it broke)." in html
    assert "1 of 8 arms not started: merge=concat seed=3." in html
    assert "python -m hdm.sweep sweep=merge-1" in html
    assert "commit 0123456789ab" in html and "torch 2.13.0" in html
    assert html.count("<img") == 4 * (4 + 2)  # pictures of the six finished arms
    assert "a &lt;b&gt;bold&lt;/b&gt; face &amp; more" in html
    store = Store(server)
    parent = store.sweep("merge-1").run_id
    assert store._bytes(parent, "report/index.html") == made[Path("index.html")]
    assert store._bytes(parent, "report/figures/pareto.svg") == made[Path("figures/pareto.svg")]


def test_a_sweep_from_before_sweep_json_has_a_page_too(server):
    report.command(["sweep=old-1", f"uri={server}", "out=old", "--no-log"])
    html = Path("old/index.html").read_text()
    assert "1 setting, 2 seeds, 2 arms, 2 finished" in html
    assert html.count("<img") == 2 * 4 + 2 * 4  # with the captions cut from the grids


def test_numbers_of_different_protocols_are_refused_by_field(server):
    with pytest.raises(
        HdmError,
        match=r"metric=kid/efficientnet: was measured under different protocols.*sampler.steps: 8 in merge=cross seed=0, 16",
    ):
        report.command(["sweep=merge-1", f"uri={server}", "metric=kid/efficientnet", "--no-log"])
    assert not Path("reports").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "sweep= is missing"),
        (["sweep=merge-2"], "sweep=merge-2: no such sweep .*did you mean 'merge-1'.*old-1"),
        (["sweep=a'b"], "is no name of a sweep"),
        (["sweep=merge-1", "baseline=cross"], "baseline=cross: the sweep has no such setting.*merge=cross, merge=concat"),
        (["sweep=merge-1", "noise_floor=merge-9"], "sweep=merge-9: no such sweep"),
        (["sweep=merge-1", "uri=sqlite:///elsewhere.db"], "elsewhere.db: no such database"),
        (["sweep=merge-1", "uri=off"], "uri=off keeps no runs"),
    ],
)
def test_what_cannot_be_read_is_one_line(server, arguments, message):
    with pytest.raises(HdmError, match=message) as caught:
        report.command([f"uri={server}", *arguments] if not any(a.startswith("uri=") for a in arguments) else arguments)
    assert "\n" not in str(caught.value)


def test_a_noise_floor_that_was_not_run_is_told_and_not_asked_for(server):
    """The sweep's file may name one; what the command line names must be there."""
    noise, notes = _noise(Store(server), "merge-1", None, "aa-9")
    assert noise is None
    assert "sweep=aa-9: no such sweep" in notes[0]
    assert _noise(Store(server), "merge-1", None, None) == (None, [])


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("basline=x", "did you mean 'baseline'"),
        ("merge", "'merge' is not understood"),
        ("direction=up", "expected one of minimize, maximize"),
    ],
)
def test_words_that_are_not_understood(argument, message):
    with pytest.raises(ConfigError, match=message):
        report.command(["sweep=x", argument])


def test_help_is_quick_and_complete(capsys):
    with pytest.raises(SystemExit):
        cli.main(report.command, report.__doc__, ["--help"])
    assert "noise_floor=" in capsys.readouterr().out
