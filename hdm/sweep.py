"""Compare variants: one run for every combination of the values that are listed.

usage: python -m hdm.sweep KEY=VALUE,VALUE... [KEY=VALUE ...] [seeds=N] [parallel=N] [metric=NAME] [--plan]

  python -m hdm.sweep merge=cross,concat                        two merge strategies on the quick start's data
  python -m hdm.sweep merge=glob(*) routing.rate=0,0.5 seeds=3  every merge strategy x two rates x seeds 0, 1, 2
  python -m hdm.sweep merge=cross,concat match=none,params      as they are, and with MLPs that make parameters equal
  python -m hdm.sweep sweep=merge                               the lines of sweeps/merge.yaml

Values follow Hydra's grammar: a,b,c  choice(a,b)  range(1,4)  glob(*). What is set once holds for every arm.
All arms are checked before the first one starts. Each runs in a process of its own; one that fails does not stop the others. Issue
the command again after any interruption: finished arms are kept, the others go on where they were.

seeds:     repeat every setting with seeds 0 … N-1
parallel:  arms at once; by default one per GPU, else 1
metric:    what arms are ranked by (default val/loss); direction=maximize where more is better
--plan:    print the arms and start nothing
"""

import shlex
from pathlib import Path

from hdm import cli
from hdm.config.compose import load_plugins, split_sweep
from hdm.config.errors import ConfigError, suggest
from hdm.launch.arm import compose_arms, sort_keys
from hdm.launch.campaign import Sweep, execute, progress_of

DIRECTIONS = ("minimize", "maximize")


def command(arguments: list[str]) -> int:
    """Parse, then plan or run."""
    command_line = shlex.join(["python", "-m", "hdm.sweep", *arguments])
    plan = cli.take_flag(arguments, "--plan")
    sweep = parse(arguments)
    if plan:
        print_plan(sweep)
        return 0
    return execute(sweep, again=command_line)


def parse(arguments: list[str]) -> Sweep:
    """The sweep that the arguments describe, with every arm composed and checked. Raises ConfigError for what cannot run."""
    if (name := cli.take_option(arguments, "sweep")) is not None:
        arguments = [*_file_lines(name), *arguments]
    seeds, parallel = _count(arguments, "seeds"), _count(arguments, "parallel")
    metric = cli.take_option(arguments, "metric") or "val/loss"
    direction = cli.take_option(arguments, "direction") or "minimize"
    launcher = cli.take_option(arguments, "launcher") or "local"
    if direction not in DIRECTIONS:
        raise ConfigError(f"direction={direction}: expected one of {', '.join(DIRECTIONS)}{suggest(direction, DIRECTIONS)}")
    if launcher != "local":
        raise ConfigError(f"launcher={launcher}: no such launcher (options: local)")
    load_plugins(text for text in arguments if text.startswith("plugins="))
    fixed, swept = split_sweep(arguments)
    if seeds is not None:
        if "seed" in swept or any(text.startswith("seed=") for text in fixed):
            raise ConfigError(f"seeds={seeds}: stands beside seed=; name the seeds once")
        swept["seed"] = [str(seed) for seed in range(seeds)]
    if not swept:
        raise ConfigError("nothing to compare: give a key several values, such as merge=cross,concat, or repeat with seeds=3")
    axes = sort_keys(swept)
    arms = compose_arms(fixed, axes)
    return Sweep(arms=arms, axes=axes, fixed=fixed, metric=metric, direction=direction, parallel=parallel)


def print_plan(sweep: Sweep) -> None:
    """The arms, and what is there of each."""
    for arm in sweep.arms:
        print(f"{arm.label:<40} {progress_of(arm):<12} {arm.folder}")
    print(f"{len(sweep.arms)} arms, ranked by {sweep.metric} ({sweep.direction}), in {sweep.folder}")


def _count(arguments: list[str], key: str) -> int | None:
    text = cli.take_option(arguments, key)
    if text is None:
        return None
    if not text.isdigit() or int(text) < 1:
        raise ConfigError(f"{key}={text}: expected a whole number above 0")
    return int(text)


def _file_lines(name: str) -> list[str]:
    """The arguments that sweeps/NAME.yaml stands for: `key: value`, a list for several values."""
    from hdm.config.lines import REPOSITORY, quote, read_mapping

    folders = (Path.cwd() / "sweeps", REPOSITORY / "sweeps")
    known = {path.stem: path for folder in reversed(folders) for path in sorted(folder.glob("*.yaml"))}
    if name not in known:
        raise ConfigError(
            f"sweep={name}: no such file sweeps/{name}.yaml{suggest(name, known)} (options: {', '.join(known) or 'none'})"
        )
    texts = {key: value if isinstance(value, list) else [value] for key, value in read_mapping(known[name]).items()}
    return [f"{key}={','.join(quote(v) for v in values)}" for key, values in texts.items()]


if __name__ == "__main__":
    cli.main(command, __doc__)
