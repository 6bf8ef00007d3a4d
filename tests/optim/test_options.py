"""Options as records: what is refused because nothing would read it, and the way to ``defaults`` and back."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from adaptive_bilevel import SLS, SPSB, BiSLS, BiSPS, policies
from adaptive_bilevel.errors import OptionError
from adaptive_bilevel.optim.direction import Plain
from adaptive_bilevel.optim.options import Conduct, merged, refuse_unused_moments, replaced
from tests.optim.helpers import OptimizerInfo, every_class, plain


def leaf() -> nn.Parameter:
    return nn.Parameter(torch.tensor([3.0, 2.0]))


MOMENTS = pytest.mark.parametrize(("name", "value"), [("betas", (0.5, 0.999)), ("eps", 1e-4)])


# ------------------------------------------------------------------------------------------------ unused options


@every_class
@MOMENTS
@pytest.mark.parametrize(("direction", "remedy"), [("sgd", "give direction='adam'"), (Plain(), "constants of its own")])
def test_constants_of_adam_are_refused_where_nothing_reads_them(
    info: OptimizerInfo, name: str, value: Any, direction: Any, remedy: str
) -> None:
    with pytest.raises(OptionError) as caught:
        info.cls([leaf()], direction=direction, **{name: value})
    said = str(caught.value)
    assert said.startswith(f"{info.cls.__name__}({name}={value!r}): {name} is not used with direction={direction!r}: ")
    assert remedy in said


@MOMENTS
def test_those_of_bisps_too(name: str, value: Any) -> None:
    with pytest.raises(OptionError, match=rf"^BiSPS\({name}=.*: {name} is not used with direction='sgd'"):
        BiSPS([leaf()], **{name: value})
    BiSPS([leaf()], direction="adam", **{name: value})


@every_class
def test_defaults_that_are_given_are_no_mistake(info: OptimizerInfo) -> None:
    for direction in ("sgd", Plain()):
        optimizer = info.cls([leaf()], direction=direction, betas=[0.9, 0.999], eps=1e-8)
        assert optimizer.defaults["betas"] == (0.9, 0.999)


@MOMENTS
def test_a_wrong_value_is_named_first(name: str, value: Any) -> None:
    wrong: dict[str, Any] = {name: -1.0}
    with pytest.raises(OptionError, match=rf"{name} must"):
        SLS([leaf()], **wrong)


@every_class
def test_betas_that_a_scheduler_cycles_are_saved_and_loaded(info: OptimizerInfo) -> None:
    """OneCycleLR writes betas whatever the direction: such a state is no mistake of the user's."""
    optimizer = info.cls([leaf()], 0.1)
    lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=10, base_momentum=0.5, max_momentum=0.7)
    saved = optimizer.state_dict()
    assert saved["param_groups"][0]["betas"] == (0.7, 0.999)
    again = info.cls([leaf()], 0.1)
    again.load_state_dict(saved)
    assert plain(again.state_dict()) == plain(saved)


def test_one_name_alone_can_be_checked() -> None:
    conduct = Conduct(owner="Ours", betas=(0.5, 0.9), eps=1e-4)
    with pytest.raises(OptionError, match=r"^Ours\(eps=0.0001\)"):
        refuse_unused_moments("Ours", conduct, ["eps"])
    refuse_unused_moments("Ours", conduct, [])


# ------------------------------------------------------------------------------------------------ records


@dataclasses.dataclass(frozen=True, kw_only=True)
class Late:
    c: float | None = None
    limit: int = 3


def test_records_and_defaults() -> None:
    records: dict[str, Any] = {"rule": policies.SLS(start=1.0), "conduct": Conduct(owner="Ours"), "late": Late()}
    options = merged(records.values(), ["start"])
    assert "start" not in options and "owner" not in options
    assert (options["shrink"], options["eps"], options["limit"]) == (0.5, 1e-8, 3)
    assert options["c"] is None, "a name that several records have belongs to the last"
    after: dict[str, Any] = replaced(records, {**options, "shrink": 0.75, "c": 0.3, "eps": 1e-4})
    assert after == {
        "rule": policies.SLS(start=1.0, shrink=0.75),
        "conduct": Conduct(owner="Ours", eps=1e-4),
        "late": Late(c=0.3),
    }
    assert after["conduct"].owner == "Ours"
    with pytest.raises(OptionError, match=r"^SLS\(shrink=2.0\)"):
        replaced(records, {"shrink": 2.0})
    with pytest.raises(OptionError, match=r"^Ours\(eps=-1.0\)"):
        replaced(records, {"eps": -1.0})


def test_records_are_attributes() -> None:
    optimizer = SPSB([leaf()], 0.5, c=0.5, direction="adam", eps=1e-4)
    assert optimizer.rule == policies.SPSB(c=0.5)
    assert optimizer.conduct == Conduct(owner="SPSB", direction="adam", eps=1e-4)
    assert optimizer.policy == optimizer.rule
    upper = BiSPS([leaf()], lr_min=0.125, decay="inverse")
    assert upper.policy == policies.Envelope(decay="inverse", floor=0.125, floor_decay="inverse")


@pytest.mark.parametrize("lower_bound", [None, 0.0])
def test_a_saved_lower_bound_is_loaded_with_what_goes_with_it(lower_bound: float | None) -> None:
    saved, x = SLS([leaf()], 1.0, lower_bound=lower_bound), leaf()
    loaded = SLS([x], 1.0, lower_bound=-1.0)
    loaded.load_state_dict(saved.state_dict())
    assert loaded.rule == saved.rule
    assert loaded.rule.start is None
    loaded.step(lambda: (x**2).sum())
    assert loaded.record is not None and loaded.record.moved


def test_a_policy_that_cannot_be_made_leaves_the_records() -> None:
    optimizer = BiSLS([leaf()])
    before, policy, saved = repr(optimizer), optimizer.policy, optimizer.state_dict()
    saved["param_groups"][0]["c"] = 2.0
    with pytest.raises(OptionError, match=r"c=2\.0"):
        optimizer.load_state_dict(saved)
    assert repr(optimizer) == before
    assert optimizer.policy is policy
