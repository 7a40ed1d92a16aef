"""Compare variants: one run for every combination of the values that are listed, or a search among them.

usage: python -m hdm.sweep KEY=VALUE,VALUE... [KEY=VALUE ...] [seeds=N] [OPTION=VALUE ...] [--plan] [--open]

  python -m hdm.sweep merge=cross,concat seeds=6                two merge strategies, six seeds each, on the quick start's data
  python -m hdm.sweep merge=glob(*) routing.rate=0,0.5 seeds=3  every merge strategy x two rates x seeds 0, 1, 2
  python -m hdm.sweep merge=cross,concat iso=flops              each with as many training FLOPs as the first
  python -m hdm.sweep merge=cross,concat match=none,params      as they are, and with MLPs that make parameters equal
  python -m hdm.sweep sweep=merge_ablation experiment=NAME      the axes of sweeps/merge_ablation.yaml on another experiment
  python -m hdm.sweep 'optimizer.lr=tag(log,interval(1e-3,1))' search=tpe trials=32 pruner=median
  python -m hdm.sweep sweep=merge_ablation launcher=slurm launcher.gpus=1 launcher.partition=gpu

Values follow Hydra's grammar: a,b,c  choice(a,b)  range(1,4)  glob(*), and for searches  interval(0,1)  tag(log,interval(1e-4,1))
int(interval(1,8)). What is set once holds for every arm. All arms are checked before the first one starts. Each runs in a process
of its own; one that fails does not stop the others. Issue the command again after any interruption: finished arms are kept, the
others go on where they were, jobs on the cluster are found again.

seeds        repeat every setting with seeds 0 … N-1                  metric, direction   what ranks the arms (val/loss, minimize)
iso          steps | samples | flops | seconds | parameters: all arms get as much of it as the baseline
baseline     the setting that others are compared with                noise_floor, alpha, confirmatory   how the report judges
search       grid | random | tpe | cmaes | nsgaii, with trials=N      pruner   median | hyperband;  cost   nsgaii's second aim
launcher     local | slurm, with launcher.KEY=VALUE                   parallel   arms at once
storage      sqlite:///… or postgresql://… for the study              retry_failed=false   leaves failed arms as they are
--plan       print the arms, what they cost and what they can show, and start nothing
--open       show the comparison in the browser at the end; a database is served on 127.0.0.1 until Ctrl-C

All options: docs/sweeps.md. Sweeps that come along: sweeps/*.yaml.
"""

import dataclasses
import shlex

from hdm import cli
from hdm.config.compose import DEFAULT_EXPERIMENT, compose
from hdm.config.errors import ConfigError, suggest
from hdm.config.schema import RunConfig
from hdm.launch.arm import Arm, compose_arms, compose_setting, sort_keys
from hdm.launch.campaign import Sweep, execute
from hdm.launch.grammar import Point, Statement, SweepAxis, intervals, points, said, sweep_files
from hdm.launch.options import Iso, Search, SweepOptions
from hdm.launch.search import check_search


def command(arguments: list[str]) -> int:
    """Parse, then plan or run."""
    command_line = shlex.join(["python", "-m", "hdm.sweep", *arguments])
    plan, show = cli.take_flag(arguments, "--plan"), cli.take_flag(arguments, "--open")
    sweep = parse(arguments)
    sweep.command = command_line
    if plan:
        from hdm.forecast import print_forecast

        print_forecast(sweep)
        return 0
    return execute(sweep, show=show)


def parse(arguments: list[str]) -> Sweep:
    """The sweep that the arguments describe, with every arm composed and checked. Raises ConfigError for what cannot run."""
    statement = said(arguments)
    options = SweepOptions.read(statement.options)
    if options.seeds is not None and ("seed" in statement.axes or any(text.startswith("seed=") for text in statement.fixed)):
        raise ConfigError(f"seeds={options.seeds}: stands beside seed=; name the seeds once")
    if not statement.axes and options.seeds is None:
        raise ConfigError("nothing to compare: give a key several values, such as merge=cross,concat, or repeat with seeds=3")
    axes, seeds = sort_keys(statement.axes), list(range(options.seeds or 0))
    fixed = _equal(statement, axes, options)
    if options.search is Search.grid:
        if found := intervals(axes.values()):
            axis = found[0]
            raise ConfigError(
                f"{axis.key}={axis.interval}: an interval has no list of values; write choices (a,b,c) or range(start,stop,step),"
                " or choose search=random, tpe, cmaes or nsgaii with trials=N"
            )
        arms = compose_arms(fixed, axes.values(), seeds=seeds)
        _check_baseline(options, arms)
    else:
        check_search(list(axes.values()), fixed, options)
        arms = []
    run = arms[0].run if arms else compose(fixed, default_experiment=DEFAULT_EXPERIMENT)
    seeds = seeds or sorted({arm.run.seed for arm in arms} or {run.seed})
    options.noise_floor = _noise_floor(statement, options)
    return Sweep(arms=arms, axes=axes, fixed=fixed, seeds=seeds, run=run, options=options, file=statement.file)


def _check_baseline(options: SweepOptions, arms: list[Arm]) -> None:
    settings = dict.fromkeys(arm.setting for arm in arms)
    if options.baseline is not None and options.baseline not in settings:
        near = suggest(options.baseline, settings)
        raise ConfigError(f"baseline={options.baseline}: no such setting{near} (settings: {'; '.join(settings)})")


def _noise_floor(statement: Statement, options: SweepOptions) -> str | None:
    """The name of the A/A sweep: noise_floor=FILE is that file's sweep of what holds for every arm of this one."""
    if options.noise_floor is None or options.noise_floor not in sweep_files():
        return options.noise_floor
    if options.noise_floor == statement.file:
        raise ConfigError(f"noise_floor={options.noise_floor}: is this sweep itself; leave it out")
    own = [text for text in statement.fixed if not text.startswith("track.")]
    return parse([f"sweep={options.noise_floor}", *own]).name


def _equal(statement: Statement, axes: dict[str, SweepAxis], options: SweepOptions) -> list[str]:
    """The fixed lines, with those that give every arm as much of `iso` as the baseline has."""
    fixed = statement.fixed
    if options.iso is None:
        return fixed
    swept = [key for axis in axes.values() for point in points([axis]) for key in point.lines]
    if clash := next(
        (key for key in swept if key.startswith("budget.") or (key == "match" and options.iso is Iso.parameters)), None
    ):
        raise ConfigError(f"iso={options.iso.name}: {clash} is swept, so arms are meant to differ in it; drop one of them")
    if options.iso is Iso.parameters:
        return [*(text for text in fixed if not text.startswith("match=")), "match=params"]
    run = _baseline(fixed, axes, options)
    amount = _amount(run, options.iso)
    others = [key for key in ("steps", "samples", "flops", "seconds") if key != options.iso.name]
    kept = [text for text in fixed if not text.startswith("budget.")]
    return [*kept, f"budget.{options.iso.name}={amount!r}", *(f"budget.{key}=null" for key in others)]


def _baseline(fixed: list[str], axes: dict[str, SweepAxis], options: SweepOptions) -> RunConfig:
    """The configuration of the baseline; a search's is what the lines say without its axes."""
    if options.search is not Search.grid:
        return compose_setting(fixed, Point(label={}, lines={}), [])[0].run
    settings = list(points(axes.values()))
    wanted = [p for p in settings if options.baseline in (None, " ".join(f"{k}={v}" for k, v in p.label.items()))] or settings
    return compose_setting(fixed, wanted[0], settings)[0].run


def _amount(run: RunConfig, iso: Iso) -> float:
    """How much of `iso` the baseline is given. Raises ConfigError where its budget does not say."""
    budget = run.budget
    if (said := getattr(budget, iso.name)) is not None:
        return float(said) if iso in (Iso.flops, Iso.seconds) else int(said)
    if iso is Iso.seconds:
        raise ConfigError("iso=seconds: the baseline's budget names none; set budget.seconds=N")
    from hdm.plan import plan

    stage = plan(dataclasses.replace(run, stages=[])).stages[0]
    amounts = {Iso.steps: stage.steps, Iso.samples: stage.samples, Iso.flops: stage.samples and float(stage.samples * stage.train)}
    if (amount := amounts[iso]) is None:
        raise ConfigError(
            f"iso={iso.name}: the baseline's budget does not say how much that is; set budget.{iso.name}, or budget.steps"
        )
    return amount


if __name__ == "__main__":
    cli.main(command, __doc__)
