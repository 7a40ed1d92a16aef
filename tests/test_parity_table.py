"""The table of comparisons with implementations that are not ours: what is measured, and that the tests still decide."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from benchmarks.parity import measuring
from hdm.config.lines import REPOSITORY


def test_errors_are_relative_to_the_largest_value_and_a_comparison_still_fails():
    errors = []
    check = measuring(torch.testing.assert_close, errors)
    check((torch.tensor([1.0, 10.5]), torch.zeros(2)), (torch.tensor([1.0, 10.0]), torch.zeros(2)), rtol=0, atol=1)
    with pytest.raises(AssertionError):
        check(torch.tensor([[2.0, -4.0]]), torch.tensor([[1.0, -4.0]]))
    measuring(np.testing.assert_allclose, errors)(np.array([3.0]), [4.0], atol=1)
    assert errors == [0.05, 0.0, 0.25, 0.25]


@pytest.mark.slow
def test_the_command_prints_the_marked_comparisons_alone():
    words = [sys.executable, "-m", "benchmarks.parity", "tests/model/test_mlp.py", "-k", "mix_ffn"]
    done = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    head, line, row = done.stdout.partition("| item |")[2].splitlines()
    assert (head, line) == (" against | largest relative error |", "|---|---|---|")
    item, against, error = (cell.strip() for cell in row.strip("|").split("|"))
    assert (item, against) == ("`mlp=mix_ffn`", "diffusers GLUMBConv")
    assert 0 <= float(error) < 1e-10
