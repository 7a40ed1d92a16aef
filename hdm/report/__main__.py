"""The page of a sweep, from MLflow alone: what was compared, what it came to, how sure that is, what it cost.

usage: python -m hdm.report sweep=NAME [KEY=VALUE ...] [--open] [--no-log]

  python -m hdm.report sweep=merge-seed-1f0c77ab                          reports/NAME/index.html, tables, figures
  python -m hdm.report sweep=NAME uri=http://127.0.0.1:5000               from another server
  python -m hdm.report sweep=NAME baseline="merge=concat" metric=kid/efficientnet noise_floor=seed-0badcafe

uri=           tracking URI; by default $MLFLOW_TRACKING_URI, else sqlite:///mlflow.db
baseline=      the setting that the others are compared with; by default the sweep's own, else its first
metric=        by default the one that the sweep was declared with; direction=minimize|maximize says which way is better
noise_floor=   an A/A sweep (sweeps/aa_noise_floor.yaml): differences as small as its noise print "inconclusive"
out=           reports/NAME by default
--open         show the page in the browser
--no-log       do not keep the report with the sweep's run in MLflow, below report/

The folder holds index.html (one file, needs no network), report.md, tables.tex (booktabs), one Markdown file per table, and the
figures as SVG and PNG. Numbers made under different evaluation protocols are refused. docs/statistics.md explains the tests.
"""

from pathlib import Path

from hdm import cli
from hdm.config.errors import ConfigError, HdmError, suggest

_OPTIONS = ("sweep", "uri", "baseline", "metric", "direction", "noise_floor", "out")
_DIRECTIONS = ("minimize", "maximize")


def command(arguments: list[str]) -> None:
    """Read, write, log, and say where."""
    log, show = not cli.take_flag(arguments, "--no-log"), cli.take_flag(arguments, "--open")
    for text in arguments:
        key, equals, _ = text.partition("=")
        if not equals or key not in _OPTIONS:
            raise ConfigError(
                f"'{text}' is not understood{suggest(key, _OPTIONS)} (options: {'=, '.join(_OPTIONS)}=, --no-log, --open)"
            )
    values = {key: cli.take_option(arguments, key) for key in _OPTIONS}
    name, direction = values["sweep"], values["direction"]
    if not name:
        raise ConfigError("sweep= is missing; name the sweep as `python -m hdm.sweep` does: python -m hdm.report sweep=NAME")
    if direction and direction not in _DIRECTIONS:
        raise ConfigError(f"direction={direction}: expected one of {', '.join(_DIRECTIONS)}{suggest(direction, _DIRECTIONS)}")
    folder = Path(values["out"] or f"reports/{name}")
    if folder.exists() and not folder.is_dir():
        raise HdmError(f"out={folder}: is a file; name a folder")
    from hdm.report.build import collect, write
    from hdm.report.store import Store
    from hdm.track.browse import open_page

    store = Store(values["uri"])
    with cli.progress("reading", 1, "reports") as advance:
        report = collect(
            store,
            name,
            baseline=values["baseline"],
            metric=values["metric"],
            direction=direction,
            noise_floor=values["noise_floor"],
            advance=advance,
        )
    paths = write(report, folder)
    from hdm.report import words

    for line in words.headline(report.analysis):
        print(line)
    print(paths[0])
    if log and report.analysis.record.run_id:
        store.log(report.analysis.record.run_id, paths, folder)
    if show:
        open_page(paths[0].absolute().as_uri())


if __name__ == "__main__":
    cli.main(command, __doc__)
