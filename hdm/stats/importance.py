"""Which axes of a wide search matter: the share of the variance between its points that each axis explains."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

_LOG = 100.0  # a numeric axis that spans a larger ratio is read on a log scale


def axis_importance(points: Sequence[Mapping[str, str]], values: Sequence[float]) -> tuple[dict[str, float], str]:
    """(share of the variance by axis, largest first; name of the method), from points {axis: value} and their finite values.

    fANOVA (Hutter et al., 2014) on optuna's random forest; PED-ANOVA (Watanabe et al., 2023) where that fails. ({}, "") for fewer
    than two axes that vary, or when all values are equal.
    """
    axes = [key for key in dict.fromkeys(key for point in points for key in point) if len({p.get(key, "") for p in points}) > 1]
    if len(axes) < 2 or len(set(values)) < 2 or not all(map(math.isfinite, values)):
        return {}, ""
    import optuna
    from optuna.importance import FanovaImportanceEvaluator, PedAnovaImportanceEvaluator, get_param_importances

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    laws = {key: _law([point.get(key, "") for point in points]) for key in axes}
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for point, value in zip(points, values):
        params = {key: _read(point.get(key, ""), laws[key]) for key in axes}
        study.add_trial(optuna.trial.create_trial(params=params, distributions=laws, value=value))
    try:
        shares, method = get_param_importances(study, evaluator=FanovaImportanceEvaluator(seed=0)), "fANOVA"
    except (RuntimeError, ValueError, ImportError):  # the forest found nothing to split, or there is no scikit-learn
        shares, method = get_param_importances(study, evaluator=PedAnovaImportanceEvaluator()), "PED-ANOVA"
    return {key: float(share) for key, share in shares.items()}, method


def _law(texts: Sequence[str]) -> "BaseDistribution":
    """A range for numbers, categories for anything else."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    try:
        numbers = [float(text) for text in texts]
    except ValueError:
        return CategoricalDistribution(sorted(set(texts)))
    low, high = min(numbers), max(numbers)
    if not (math.isfinite(low) and math.isfinite(high)):
        return CategoricalDistribution(sorted(set(texts)))
    return FloatDistribution(low, high, log=low > 0 and high / low >= _LOG)


def _read(text: str, law: "BaseDistribution") -> str | float:
    from optuna.distributions import FloatDistribution

    return float(text) if isinstance(law, FloatDistribution) else text
