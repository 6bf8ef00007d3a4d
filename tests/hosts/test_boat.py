"""BOAT itself, where it is installed: `make test-hosts`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from adaptive_bilevel import BiSLS
from tests.hosts.problem import T_VAL, X_VAL, Problem, T, X

boat: Any = pytest.importorskip("boat_torch")
pytestmark = pytest.mark.filterwarnings("ignore")  # theirs


class Decay(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.raw = nn.Parameter(torch.full((20,), -4.0))


def ul_loss(feed: Any, upper: Any, lower: Any, **given: Any) -> Tensor:
    return mse_loss(lower(feed["x"], **given)[:, 0], feed["t"])


def ll_loss(feed: Any, upper: Any, lower: Any, **given: Any) -> Tensor:
    weight = next(iter(given.get("params", lower.parameters())))
    return ul_loss(feed, upper, lower, **given) + (upper.raw.sigmoid() * weight**2).sum() / 2


def problem(hypergradient: str, log: Path) -> tuple[Any, nn.Module, nn.Module, Any]:
    """Return BOAT's problem, both models, and the lower optimizer."""
    lower, upper = Problem().model, Decay()
    inner = torch.optim.SGD(lower.parameters(), lr=0.1)
    config = {
        "fo_op": None,
        "gm_op": ["NGD"],
        "na_op": [hypergradient],
        "lower_level_model": lower,
        "upper_level_model": upper,
        "lower_level_var": list(lower.parameters()),
        "upper_level_var": list(upper.parameters()),
        "lower_level_opt": inner,
        "upper_level_opt": torch.optim.Adam(upper.parameters(), lr=0.01),
        "lower_iters": 20,
        "device": "cpu",
        "CG": {"tolerance": 1e-10, "k": 20},
        "GDA": {"alpha_init": 0.0, "alpha_decay": 0.5},
        "RGT": {"truncate_iter": 0},
        "accumulate_grad": False,
        "loss_log_path": str(log / "losses.json"),
        "return_grad": True,  # run_iter leaves the step to us
        "copy_last_param": True,  # and the lower variable in the lower model
    }
    names = {"lower_level_loss": "ll_loss", "upper_level_loss": "ul_loss"}
    made = boat.Problem(config, {level: {"function": f"{__name__}.{name}"} for level, name in names.items()})
    made.build_ll_solver()
    made.build_ul_solver()
    return made, lower, upper, inner


@pytest.mark.parametrize("hypergradient", ["CG", "RAD"])
def test_its_iteration_leaves_the_step_to_a_search(hypergradient: str, tmp_path: Path) -> None:
    made, lower, upper, inner = problem(hypergradient, tmp_path)
    outer = BiSLS(upper.parameters(), lower=inner, direction="adam")
    ll_feed, ul_feed = {"x": X, "t": T}, {"x": X_VAL, "t": T_VAL}
    losses = []
    for k in range(30):
        made.run_iter(ll_feed, ul_feed, k)
        loss = outer.step(lambda: ul_loss(ul_feed, upper, lower), lambda: ll_loss(ll_feed, upper, lower))
        outer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < 0.75 * losses[0]
    assert outer.record is not None and outer.record.moved
