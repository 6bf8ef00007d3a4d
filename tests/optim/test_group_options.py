"""Groups hold what the constructor takes, and rates from schedulers that no rule can use are errors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from adaptive_bilevel import SPSB, BiSLS, BiSPS, OneStepBiSLS
from adaptive_bilevel.errors import OptionError
from tests.optim.helpers import OptimizerInfo, every_class, leaf, plain, quadratic

_UPPER = [BiSLS, BiSPS, OneStepBiSLS]


@every_class
@pytest.mark.parametrize(
    "entry",
    [{"nestrov": False}, {"amsgrad": True}, {"fused": True}, {"steps": 3}, {"dampening": 0.1}, {"lr": True}],
    ids=str,
)
def test_what_the_constructor_does_not_take_is_refused(info: OptimizerInfo, entry: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=f"{info.cls.__name__}: a parameter group has {next(iter(entry))}="):
        info.make([{"params": [leaf()], **entry}], None)


@pytest.mark.parametrize("cls", _UPPER)
def test_also_of_upper_optimizers(cls: Any) -> None:
    for entry in ({"maximize": True}, {"solvr": 1}):
        with pytest.raises(OptionError, match=f"{cls.__name__}: a parameter group has {next(iter(entry))}="):
            cls([{"params": [leaf()], **entry}])


@every_class
def test_the_infinite_rate_is_that_of_the_constructor(info: OptimizerInfo) -> None:
    for make in (lambda: info.cls([leaf()], math.inf), lambda: info.cls([{"params": [leaf()], "lr": math.inf}])):
        if info.searches:
            with pytest.raises(OptionError, match="lr=inf"):
                make()
        else:
            make()


@every_class
def test_names_and_what_is_off_are_taken(info: OptimizerInfo) -> None:
    group = {"params": [leaf()], "name": "head", "initial_lr": 0.1, "weight_decay": 0.0, "foreach": None}
    optimizer = info.make([group])
    assert optimizer.param_groups[0]["name"] == "head"


@every_class
@pytest.mark.parametrize("lr", [-1.0, math.nan, -math.inf])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_rate_that_a_scheduler_made_wrong_is_an_error(info: OptimizerInfo, lr: float, groups: int) -> None:
    tensors = [leaf() for _ in range(groups)]
    optimizer = info.make([{"params": [x]} for x in tensors])
    optimizer.step(lambda: sum(map(quadratic, tensors)))
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 1.0)
    optimizer.param_groups[-1]["lr"] = lr
    before, points = plain(dict(optimizer.state)), [x.detach().clone() for x in tensors]
    with pytest.raises(OptionError, match=r"lr=.*scheduler"):
        optimizer.step(lambda: sum(map(quadratic, tensors)))
    assert plain(dict(optimizer.state)) == before
    assert all(map(torch.equal, tensors, points))


@pytest.mark.parametrize("cls", _UPPER)
def test_that_of_an_upper_optimizer_too(cls: Any) -> None:
    x, y = leaf(), leaf()
    inner = SPSB([y])
    outer = cls([x], lower=inner)
    inner.step(lambda: (y - x).square().sum())
    x.grad, before = torch.ones(2), x.detach().clone()
    outer.param_groups[0]["lr"] = -1.0
    with pytest.raises(OptionError, match=r"lr=-1\.0"):
        outer.step(lambda: y.square().sum())
    assert torch.equal(x, before) and torch.equal(x.grad, torch.ones(2))
