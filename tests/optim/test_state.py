"""Saved state: a run goes on bit for bit after saving, copying and rebuilding, and what is not loaded."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adaptive_bilevel import SPSB
from adaptive_bilevel.errors import OptionError
from tests.optim.helpers import (
    OptimizerInfo,
    batches,
    every_class,
    every_optimizer,
    leaf,
    net,
    plain,
    quadratic,
    run,
    snapshot,
)


def train(optimizer: Any, model: nn.Module, first: int, last: int) -> None:
    torch.manual_seed(first)
    run(optimizer, model, batches(8)[first:last])


@every_optimizer
@pytest.mark.parametrize("lr", [0.1, None])
@pytest.mark.parametrize("fresh_lr", ["same", "left out"])
def test_saved_state_continues_bitwise(info: OptimizerInfo, lr: float | None, fresh_lr: str) -> None:
    straight = net()
    optimizer = info.make(straight.parameters(), lr)
    train(optimizer, straight, 0, 4)
    file = io.BytesIO()
    torch.save({"model": straight.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    train(optimizer, straight, 4, 8)

    resumed = net(seed=5)
    resumed.load_state_dict(saved["model"])
    again = info.make(resumed.parameters(), lr if fresh_lr == "same" else None)
    again.load_state_dict(saved["optimizer"])
    train(again, resumed, 4, 8)
    assert snapshot(resumed, again) == snapshot(straight, optimizer)
    assert repr(again.record) == repr(optimizer.record)


@every_optimizer
def test_state_dict_is_not_changed_by_later_steps(info: OptimizerInfo) -> None:
    x = leaf()
    optimizer = info.make([x], None)
    optimizer.step(lambda: quadratic(x))
    saved = optimizer.state_dict()
    before = plain(saved["param_groups"][0]["shared_state"]["policy"])
    optimizer.step(lambda: quadratic(x))
    assert plain(saved["param_groups"][0]["shared_state"]["policy"]) == before


@every_class
def test_defaults_and_state_are_plain(info: OptimizerInfo) -> None:
    x = leaf()
    optimizer = info.make([x], None)
    optimizer.step(lambda: quadratic(x))

    def check(value: Any) -> None:
        if isinstance(value, dict):
            for v in value.values():
                check(v)
        elif isinstance(value, (list, tuple)):
            for v in value:
                check(v)
        else:
            assert value is None or isinstance(value, (bool, int, float, str, Tensor))

    check(optimizer.defaults)
    check(optimizer.state_dict())


@every_optimizer
@pytest.mark.parametrize("how", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"])
def test_copies_continue_bitwise(info: OptimizerInfo, how: Any) -> None:
    model = net()
    optimizer = info.make(model.parameters(), None)
    train(optimizer, model, 0, 4)
    other_model, other = how((model, optimizer))
    train(optimizer, model, 4, 8)
    train(other, other_model, 4, 8)
    assert snapshot(other_model, other) == snapshot(model, optimizer)


@every_optimizer
@pytest.mark.parametrize("lr", [0.1, None])
def test_rebuilt_from_defaults(info: OptimizerInfo, lr: float | None) -> None:
    results = []
    for rebuild in (False, "at once", "after loading"):
        model = net()
        optimizer = info.make(model.parameters(), lr)
        if rebuild == "after loading":
            optimizer.load_state_dict(optimizer.state_dict())
        if rebuild:
            optimizer = optimizer.__class__(model.parameters(), **optimizer.defaults)
        train(optimizer, model, 0, 5)
        results.append(snapshot(model, optimizer))
    assert results[0] == results[1] == results[2]


@every_class
def test_loaded_options_are_those_that_were_saved(info: OptimizerInfo) -> None:
    models = net(), net()
    saved = info.make(models[0].parameters(), c=0.35, max_skips=7)
    loaded = info.make(models[1].parameters())
    loaded.load_state_dict(saved.state_dict())
    for model, optimizer in zip(models, (saved, loaded), strict=True):
        train(optimizer, model, 0, 4)
    assert snapshot(models[0], saved) == snapshot(models[1], loaded)
    assert repr(loaded) == repr(saved)


@every_optimizer
@pytest.mark.parametrize("stock", [torch.optim.SGD, torch.optim.Adam], ids=lambda cls: cls.__name__)
def test_another_optimizer_s_state_is_refused(info: OptimizerInfo, stock: Any) -> None:
    model = net()
    optimizer = info.make(model.parameters())
    train(optimizer, model, 0, 2)
    before = snapshot(model, optimizer)
    with pytest.raises(OptionError, match=r"load_state_dict: .*of another optimizer.*make a new"):
        optimizer.load_state_dict(stock(net().parameters(), lr=0.1).state_dict())
    assert snapshot(model, optimizer) == before


@every_class
def test_a_wrong_saved_option_changes_nothing(info: OptimizerInfo) -> None:
    model = net()
    optimizer = info.make(model.parameters())
    saved, before = optimizer.state_dict(), repr(optimizer)
    saved["param_groups"][0]["c"] = -1.0
    with pytest.raises(OptionError, match=r"c=-1.0"):
        optimizer.load_state_dict(saved)
    assert repr(optimizer) == before


def twice_slower(k: Any) -> Any:
    return 1.0 / (2 * k + 1)


def test_callables_stay_out_of_the_state() -> None:
    models = net(), net()
    optimizer = SPSB(models[0].parameters(), 0.1, decay=twice_slower)
    assert optimizer.defaults["decay"] == "callable"
    train(optimizer, models[0], 0, 3)
    with pytest.raises(OptionError, match="decay"):
        SPSB(models[1].parameters(), 0.1).load_state_dict(optimizer.state_dict())
    other = SPSB(models[1].parameters(), 0.1, decay=twice_slower)
    train(other, models[1], 0, 3)
    other.load_state_dict(optimizer.state_dict())
    copied = pickle.loads(pickle.dumps(optimizer))
    for o, m in ((optimizer, models[0]), (other, models[1])):
        train(o, m, 3, 6)
    assert snapshot(models[0], optimizer) == snapshot(models[1], other)
    assert copied.rule.decay is twice_slower
