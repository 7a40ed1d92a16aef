"""Errors that a person reads: one line each, saying what, where and what to do."""

import difflib
from collections.abc import Iterable


class HdmError(Exception):
    """Anything that a command reports as one line instead of a traceback."""

    exit_code = 2  # bad input; 1 where the input was fine and something failed on the way


class ConfigError(HdmError):
    """A key or value that cannot be used; raised before anything heavy is imported."""


class DataError(HdmError):
    """A data set, shard or sample that cannot be read."""


class CheckpointError(HdmError):
    """A checkpoint that is missing, damaged or of another architecture."""


class TrainingError(HdmError):
    """Training that cannot go on: a loss or gradient that is not finite."""

    exit_code = 1


class LostProcess(TrainingError):
    """Another process of the run is gone."""


class TrackingError(HdmError):
    """A tracking server that cannot be reached or refuses what it is sent."""

    exit_code = 1


class AssetError(HdmError):
    """Pretrained weights or a package that an encoder, autoencoder or metric needs and that is not here."""


def suggest(name: str, options: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" for the closest of `options`, or "" when none is close."""
    close = difflib.get_close_matches(name, list(options), n=1, cutoff=0.6)
    return f"; did you mean '{close[0]}'?" if close else ""
