"""The tasks by name: `BILEVEL[name](seed, folder, **settings)` makes a fresh one; likewise `SINGLE_LEVEL`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from . import (
    architecture,
    distillation,
    few_shot,
    hyper_cleaning,
    hyper_representation,
    image_classification,
    label_noise,
    logistic_regression,
    meta_weight,
    random_quadratic,
    regularisation,
    smoothing,
    start_of_few_shot,
    two_quadratics,
    weight_decay,
    wide_quadratic,
)
from .base import Settings, SingleLevelTask, Task

BILEVEL: dict[str, Callable[..., Task]] = {
    "architecture": architecture.create,
    "distillation": distillation.create,
    "few-shot": few_shot.create,
    "hyper-cleaning": hyper_cleaning.create,
    "hyper-representation": hyper_representation.create,
    "hyper-representation-lenet": partial(hyper_representation.create, convolutional=True),
    "label-noise": label_noise.create,
    "meta-weight": meta_weight.create,
    "random-quadratic": random_quadratic.create,
    "regularisation": regularisation.create,
    "smoothing": smoothing.create,
    "start-of-few-shot": start_of_few_shot.create,
    "weight-decay": weight_decay.create,
    "wide-quadratic": wide_quadratic.create,
}
NETWORK_BELOW = ("architecture", "label-noise", "meta-weight", "smoothing", "start-of-few-shot", "weight-decay")
SINGLE_LEVEL: dict[str, Callable[..., SingleLevelTask]] = {
    "logistic-regression": logistic_regression.create,
    "lenet": image_classification.create,
    "two-quadratics": two_quadratics.create,
}

__all__ = ["BILEVEL", "NETWORK_BELOW", "SINGLE_LEVEL", "Settings", "SingleLevelTask", "Task"]
