"""What the tests of evaluation share: a search with many trials, an error of their own, side effects as values."""

from __future__ import annotations

from typing import Any

import torch

from adaptive_bilevel import SLS
from tests.optim.helpers import plain

ORIGINAL_BACKWARD = torch.autograd.backward


class Broken(Exception):
    pass


def side_effects(model: Any) -> Any:
    """Everything but the parameters that an evaluation changes."""
    return plain([dict(model.named_buffers()), torch.get_rng_state()])


def many_trials(params: Any) -> SLS:
    """A search that makes several trials from its first step on."""
    return SLS(params, 1e3, lower_bound=None, reset="initial")
