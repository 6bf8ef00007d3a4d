"""The tasks by name: `TASKS[name](seed, folder, **settings)` makes a fresh one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from . import distillation, hyper_cleaning, hyper_representation, logistic_regression, random_quadratic
from .base import Settings, Task
from .logistic_regression import LogisticRegression

TASKS: dict[str, Callable[..., Any]] = {
    "hyper-representation": hyper_representation.create,
    "hyper-representation-lenet": partial(hyper_representation.create, convolutional=True),
    "distillation": distillation.create,
    "hyper-cleaning": hyper_cleaning.create,
    "random-quadratic": random_quadratic.create,
    **{
        name: partial(logistic_regression.create, name=name)
        for name in ("w8a", "a9a", "mushrooms", "phishing", "ijcnn1")
    },
}

__all__ = ["TASKS", "LogisticRegression", "Settings", "Task"]
