"""Measure every comparison with an implementation that is not ours: the largest relative error of each, as a table.

  python -m benchmarks.parity [PYTEST-ARGUMENTS ...]

Runs the tests marked `parity(item, against)`; without arguments those of tests/model, tests/diffusion and tests/train. The error is
max |ours - theirs| / max |theirs| of a comparison, and of an item the largest over its comparisons: all parametrizations, outputs
and gradients. Exit status: pytest's, so not 0 when a comparison fails.
"""

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_leaves

from hdm.config.lines import REPOSITORY

FOLDERS = ("tests/model", "tests/diffusion", "tests/train")


@dataclass
class Row:
    """What is known of one item."""

    errors: list[float] = field(default_factory=list)
    outcomes: list[str] = field(default_factory=list)

    def cell(self) -> str:
        if "failed" in self.outcomes:
            return "FAILED"
        return f"{max(self.errors):.1e}" if self.errors else "not run: the package or a device is missing"


class Measure:
    """A plugin of pytest that measures what marked tests compare, and changes nothing of what they demand."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, str], Row] = {}

    def pytest_configure(self, config: pytest.Config) -> None:
        config.option.markexpr = "parity"

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Function) -> Iterator[None]:
        row = self.row(item)
        with (
            mock.patch.object(torch.testing, "assert_close", measuring(torch.testing.assert_close, row.errors)),
            mock.patch.object(np.testing, "assert_allclose", measuring(np.testing.assert_allclose, row.errors)),
        ):
            return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Function) -> Iterator[None]:
        report = yield
        self.row(item).outcomes.append(report.outcome)
        return report

    def row(self, item: pytest.Function) -> Row:
        """The row of a test; its marker may name its parameters in braces."""
        given = getattr(item, "callspec", None)
        what, against = item.get_closest_marker("parity").args
        return self.rows.setdefault((what.format(**(given.params if given else {})), against), Row())


def measuring(check: Any, errors: list[float]) -> Any:
    """`check(ours, theirs, ...)`, which also notes the error."""

    def measured(ours: Any, theirs: Any, *args: Any, **kwargs: Any) -> None:
        pairs = zip(tree_leaves(ours), tree_leaves(theirs))
        errors.extend(relative(np.asarray(double(a)), np.asarray(double(b))) for a, b in pairs)
        check(ours, theirs, *args, **kwargs)

    return measured


def double(value: Any) -> Any:
    return value.detach().double().cpu().numpy() if isinstance(value, torch.Tensor) else value


def relative(ours: Any, theirs: Any) -> float:
    size = np.abs(theirs).max(initial=0.0)
    return float(np.abs(ours - theirs).max(initial=0.0) / size) if size > 0 else 0.0


def main(arguments: list[str]) -> int:
    os.chdir(REPOSITORY)
    measure = Measure()
    chosen = arguments or list(FOLDERS)
    code = pytest.main(["-p", "no:cacheprovider", "-p", "no:xdist", *chosen], plugins=[measure])
    print("| item | against | largest relative error |\n|---|---|---|")
    for (item, against), row in sorted(measure.rows.items()):
        print(f"| {item} | {against} | {row.cell()} |")
    return int(code)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
