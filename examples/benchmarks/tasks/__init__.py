"""The tasks by name: `BILEVEL[name](seed, folder, **settings)` makes a fresh one; likewise `SINGLE_LEVEL`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from . import (
    distillation,
    few_shot,
    hyper_cleaning,
    hyper_representation,
    image_classification,
    logistic_regression,
    random_quadratic,
    regularisation,
    two_quadratics,
    wide_quadratic,
)
from .base import Settings, SingleLevelTask, Task

BILEVEL: dict[str, Callable[..., Task]] = {
    "distillation": distillation.create,
    "few-shot": few_shot.create,
    "hyper-cleaning": hyper_cleaning.create,
    "hyper-representation": hyper_representation.create,
    "hyper-representation-lenet": partial(hyper_representation.create, convolutional=True),
    "random-quadratic": random_quadratic.create,
    "regularisation": regularisation.create,
    "wide-quadratic": wide_quadratic.create,
}
SINGLE_LEVEL: dict[str, Callable[..., SingleLevelTask]] = {
    "logistic-regression": logistic_regression.create,
    "lenet": image_classification.create,
    "two-quadratics": two_quadratics.create,
}

__all__ = ["BILEVEL", "SINGLE_LEVEL", "Settings", "SingleLevelTask", "Task"]
