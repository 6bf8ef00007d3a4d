"""NumPy's numbers are welcome wherever a number is, and none of them is kept: checkpoints hold Python's."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from adaptive_bilevel import SLS, SPSB, BiSLS, BiSPS, policies
from tests.optim.helpers import OptimizerInfo, every_class, every_optimizer, every_polyak, plain

NUMPY: dict[str, Any] = {
    "c": np.float32(0.25),
    "lower_bound": np.float64(-0.5),
    "betas": [np.float32(0.5), np.float64(0.75)],
    "eps": np.float32(2.0**-20),
    "max_skips": np.int64(3),
}
SEARCH: dict[str, Any] = {
    "shrink": np.float32(0.75),
    "grow": np.float32(2.0),
    "slack": np.float64(0.0),
    "max_trials": np.int32(60),
}


def ordinary(value: Any) -> Any:
    return tuple(v.item() for v in value) if isinstance(value, list) else value.item()


def saved(optimizer: Any) -> Any:
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def trained(make: Any, **at_step: Any) -> tuple[Any, nn.Parameter]:
    x = nn.Parameter(torch.tensor([3.0, 2.0]))
    optimizer = make(x)
    for _ in range(4):
        x.grad = x.detach().clone()
        optimizer.step(lambda: 0.5 * (x**2).sum(), **at_step)
    return optimizer, x


@every_optimizer
@pytest.mark.parametrize("lr", [np.float32(0.5), np.int64(1)], ids=repr)
def test_options(info: OptimizerInfo, lr: Any) -> None:
    options = {**NUMPY, **(SEARCH if info.searches else {})}
    if info.options.get("direction") != "adam":
        del options["betas"], options["eps"]  # refused where nothing reads them
    given, x = trained(lambda x: info.make([x], lr, **options))
    usual, y = trained(lambda x: info.make([x], lr.item(), **{name: ordinary(v) for name, v in options.items()}))
    assert given.defaults == usual.defaults
    assert plain(saved(given)) == plain(saved(usual))
    assert torch.equal(x, y)


@pytest.mark.parametrize("cls", [BiSPS, BiSLS])
def test_options_of_the_upper_level(cls: Any) -> None:
    options = {**NUMPY, "direction": "adam", **(SEARCH if cls is BiSLS else {"lr_min": np.float32(0.25)})}
    given, x = trained(lambda x: cls([x], np.float32(0.5), **options))
    usual, y = trained(
        lambda x: cls([x], 0.5, **{n: v if n == "direction" else ordinary(v) for n, v in options.items()})
    )
    assert given.defaults == usual.defaults
    assert plain(saved(given)) == plain(saved(usual))
    assert torch.equal(x, y)


@every_optimizer
def test_lr_of_a_group_and_from_a_scheduler(info: OptimizerInfo) -> None:
    x, y = (nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = info.make([{"params": [x]}, {"params": [y], "lr": np.float32(0.5)}])
    assert type(optimizer.param_groups[1]["lr"]) is float
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: np.float64(0.9**epoch))
    for _ in range(2):
        optimizer.step(lambda: (x**2 + y**2).sum())
        scheduler.step()
    assert [type(group["lr"]) for group in saved(optimizer)["param_groups"]] == [float, float]


@every_polyak
def test_a_lower_bound_of_a_step(info: OptimizerInfo) -> None:
    given, x = trained(lambda x: info.make([x], None), lower_bound=np.float64(-0.5))
    usual, y = trained(lambda x: info.make([x], None), lower_bound=-0.5)
    assert plain(saved(given)) == plain(saved(usual))
    assert torch.equal(x, y)


@pytest.mark.parametrize("lr", [0.5, None])
@pytest.mark.parametrize(
    "kind", [np.float64, np.float32, lambda value: np.where(True, value, 0.0)], ids=["float64", "float32", "array"]
)
def test_a_schedule_in_numpy(lr: float | None, kind: Any) -> None:
    def decay(k: Any) -> Any:
        return kind(0.5**k)

    straight, x = trained(lambda x: SPSB([x], lr, decay=decay))
    again = SPSB([y := nn.Parameter(x.detach().clone())], lr, decay=decay)
    again.load_state_dict(saved(straight))
    for optimizer, z in ((straight, x), (again, y)):
        optimizer.step(lambda: 0.5 * (z**2).sum())
    assert torch.equal(x, y)
    assert {type(v) for v in straight.state["policy"].values()} <= {int, float}
    assert type(straight.param_groups[0]["step_size"]) is float


@every_class
def test_a_schedule_that_returns_no_number(info: OptimizerInfo) -> None:
    if "decay" not in info.make([nn.Parameter(torch.ones(2))]).defaults:
        return
    x = nn.Parameter(torch.tensor([3.0, 2.0]))
    optimizer = info.make([x], decay=lambda k: None)
    with pytest.raises(ValueError, match=r"decay=<function .*returned None for k=0; it must return a number"):
        optimizer.step(lambda: 0.5 * (x**2).sum())
    assert x.tolist() == [3.0, 2.0] and "policy" not in optimizer.state


@pytest.mark.parametrize(
    ("policy", "options"),
    [
        (policies.SLS, {"start": np.float32(0.5), "max_step": np.float32(2.0), **SEARCH}),
        (policies.SLSB, {"bound": np.float32(0.5), **SEARCH}),
        (policies.SPSB, {"bound": np.float32(0.5), "c": np.float32(1.0)}),
        (policies.DecSPS, {"bound": np.float32(0.5)}),
        (policies.GradientNorm, {"initial": np.float32(2.0)}),
        (policies.Constant, {"bound": np.float32(0.5)}),
    ],
)
def test_policies_compute_in_the_kind_of_the_sample(policy: Any, options: dict[str, Any]) -> None:
    policy = policy(**options)
    record, state = policy.step(policy.init(), loss=1.0, slope=4.0, trial=lambda a: (1.0 - 2.0 * a) ** 2)
    assert type(record.step_size) is float
    assert {type(value) for value in state} <= {int, float}


def test_a_wrong_number_is_shown_as_it_was_given() -> None:
    wrong: dict[str, Any] = {"c": np.float32(1.5)}
    with pytest.raises(ValueError, match=r"SLS\(c=np.float32\(1.5\)\)"):
        SLS([nn.Parameter(torch.ones(1))], **wrong)
