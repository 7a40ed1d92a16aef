"""FID and KID (Heusel et al., 2017; Binkowski et al., 2018) and their kin: how far the generated images are from the real as a set.

KID, precision and recall, and the extractors are torch-fidelity's. The Fréchet distance is ours (eval/frechet.py): its trace is
faster, and exact with fewer images than features, where eigenvalues of the product of covariances lose digits.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from rich.console import Console

from eval import manifold
from eval.confidence import error_of
from eval.extractor import Extractor, named, resolve
from eval.features import features as vectors
from eval.frechet import Array, Gaussian, frechet
from eval.kernel import gaussian, mmd, mmd_error, polynomial
from eval.measure import Drawn, Measured
from eval.protocol import versions
from eval.reference import Reference, reference
from hdm.config.errors import DataError
from hdm.config.schema import RunConfig

KID_SUBSET = 1000
CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0  # Jayasumana et al., 2024


def require(run: RunConfig, features: str | None = None, **_: Any) -> None:
    """Raise ConfigError for an extractor that nobody registered, AssetError when its weights are not here."""
    _extractor(run, Console(quiet=True), features)


def measure(drawn: Drawn, features: str | None = None, kinds: Sequence[str] = ("fid", "kid")) -> Measured:
    """`KIND/EXTRACTOR` of the generated images against the real ones, KIND being fid, kid, fd, kd, prdc or cmmd.

    Raises AssetError without weights, DataError for a reference of another extractor or with too few images.
    """
    found = _extractor(drawn.run, drawn.console, features)
    real = reference(drawn, found)
    generated = vectors(drawn.pictures, found, cache=drawn.cache, device=drawn.device, title="generated images")
    _check(generated, "generated images")
    _check(real.features, "real images")
    values: dict[str, float] = {}
    errors: dict[str, float] = {}
    protocol: dict[str, Any] = {"extractor": found.facts(), "reference": real.digest, "reference_samples": len(real.features)}
    for kind in kinds:
        part = _KINDS[kind](drawn, generated, real, found)
        values |= part.values
        errors |= part.errors
        protocol |= part.protocol
    return Measured(values=values, errors=errors, protocol={**protocol, "versions": versions(found.libraries)})


def kid_estimator(samples: int, others: int | None = None) -> dict[str, Any]:
    """Up to 1000 samples in both sets, the unbiased estimate from all; else the usual mean over 100 subsets of up to 1000."""
    fewest = min(samples, samples if others is None else others)
    whole = samples <= KID_SUBSET and others in (None, samples)
    return {"kid_subsets": 1 if whole else 100, "kid_subset_size": min(fewest, KID_SUBSET)}


def _extractor(run: RunConfig, console: Console, fixed: str | None) -> Extractor:
    return resolve(run.eval, console) if fixed is None else named(fixed, run.eval)


def _frechet(kind: str) -> Any:
    def part(drawn: Drawn, generated: Array, real: Reference, extractor: Extractor) -> Measured:
        name, target = f"{kind}/{extractor.name}", Gaussian.of_features(real.features)
        value = frechet(Gaussian.of_features(generated), target)
        errors = {}
        if drawn.weights is not None:
            errors[name] = error_of(lambda rows: frechet(Gaussian.of_features(generated[rows]), target), drawn.weights)
        if len(generated) < generated.shape[1]:
            drawn.console.print(
                f"{name}: {len(generated)} images are fewer than the {generated.shape[1]} features: it is biased upwards and"
                " compares with no other count; read KID",
                highlight=False,
            )
        return Measured(values={name: value}, errors=errors, protocol={"frechet": "squared, float64"})

    return part


def _kernel_distance(kind: str) -> Any:
    def part(drawn: Drawn, generated: Array, real: Reference, extractor: Extractor) -> Measured:
        from hdm import torchvision_cpu

        torchvision_cpu.declare()
        from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric

        name, estimator = f"{kind}/{extractor.name}", kid_estimator(len(generated), len(real.features))
        sets = torch.from_numpy(generated), torch.from_numpy(real.features)
        value = float(kid_features_to_metric(*sets, verbose=False, **estimator)[KEY_METRIC_KID_MEAN])
        errors = {}
        if drawn.weights is not None:
            errors[name] = mmd_error(generated, real.features, polynomial, drawn.weights)
        return Measured(values={name: value}, errors=errors, protocol={"kid": estimator})

    return part


def _prdc(drawn: Drawn, generated: Array, real: Reference, extractor: Extractor) -> Measured:
    fewest = min(len(generated), len(real.features))
    if fewest <= manifold.NEIGHBOURS:
        raise DataError(f"eval.prdc: {fewest} images are too few for {manifold.NEIGHBOURS} neighbours; ask for more eval.samples")
    values = manifold.prdc(generated, real.features)
    errors = manifold.prdc_errors(generated, real.features, drawn.weights) if drawn.weights is not None else {}
    return Measured(
        values={f"{name}/{extractor.name}": value for name, value in values.items()},
        errors={f"{name}/{extractor.name}": value for name, value in errors.items()},
        protocol={"neighbours": manifold.NEIGHBOURS},
    )


def _cmmd(drawn: Drawn, generated: Array, real: Reference, extractor: Extractor) -> Measured:
    kernel = gaussian(CMMD_SIGMA)
    name = f"cmmd/{extractor.name}"
    values = {
        name: CMMD_SCALE * mmd(generated, real.features, kernel, biased=True),
        f"{name}_unbiased": CMMD_SCALE * mmd(generated, real.features, kernel),
    }
    errors = {}
    if drawn.weights is not None:
        error = CMMD_SCALE * mmd_error(generated, real.features, kernel, drawn.weights)
        errors = dict.fromkeys(values, error)
    return Measured(values=values, errors=errors, protocol={"kernel": f"gaussian, sigma {CMMD_SIGMA:g}, times {CMMD_SCALE:g}"})


_KINDS = {
    "fid": _frechet("fid"),
    "kid": _kernel_distance("kid"),
    "fd": _frechet("fd"),
    "kd": _kernel_distance("kd"),
    "prdc": _prdc,
    "cmmd": _cmmd,
}


def _check(values: Array, what: str) -> None:
    if not np.isfinite(values).all():
        raise DataError(f"{what}: {int((~np.isfinite(values)).any(axis=1).sum())} have features that are not finite; look at them")
    if len(values) < 2:
        raise DataError(f"{what}: {len(values)} are too few; ask for more eval.samples")
