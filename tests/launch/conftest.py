"""Shards of noise for the run of `tiny_run.py`."""

import pytest
from tiny_run import write_shards


@pytest.fixture
def shards(tmp_path):
    return write_shards(tmp_path)
