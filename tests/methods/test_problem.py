"""Problems of every arrangement: trees of tensors, modules, parts that a loss does not use, and wrong ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from adaptive_bilevel import methods
from adaptive_bilevel.errors import ClosureError, TensorError
from adaptive_bilevel.hypergradient import Implicit, Neumann
from tests.methods.helpers import data, network_problem, problem_of, run
from tests.optim.helpers import Net, net, plain
from tests.problems import b2, ridge_hpo


def trees() -> tuple[methods.BilevelProblem, dict[str, Any], dict[str, Any]]:
    problem = ridge_hpo()

    def x_of(x: Any) -> Tensor:
        return torch.cat([x["a"], x["rest"][0], x["rest"][1]["b"]])

    def y_of(y: Any) -> Tensor:
        return torch.cat([y["w"].reshape(-1), y["bias"]])

    built = methods.BilevelProblem(
        upper_loss=lambda x, y, _: problem.f(x_of(x), y_of(y)), lower_loss=lambda x, y, _: problem.g(x_of(x), y_of(y))
    )
    x, y = problem.x0, problem.y0
    return built, {"a": x[:2], "rest": (x[2:3], {"b": x[3:]})}, {"w": y[:4].reshape(2, 2), "bias": y[4:]}


@pytest.mark.filterwarnings("ignore:.*descend")
@pytest.mark.parametrize("name", methods.names())
def test_trees_of_tensors_give_what_one_tensor_gives(name: str) -> None:
    problem, x, y = trees()
    options: dict[str, Any] = {} if name == "d-tfbo" else {"lower_steps": 2}
    options |= {"momentum": False} if name == "bisls-adam" else {}  # else its metric has a mean for each tensor
    whole = run(name, ridge_hpo(), 3, **options)
    parts = list(methods.run(name, problem, x, y, iterations=3, **options))
    for one, many in zip(whole, parts, strict=True):
        assert torch.allclose(one.x, torch.cat([many.x["a"], many.x["rest"][0], many.x["rest"][1]["b"]]), atol=1e-10)
        assert torch.allclose(one.y, torch.cat([many.y["w"].reshape(-1), many.y["bias"]]), atol=1e-10)
        assert one.evaluations == many.evaluations
    assert set(parts[-1].hypergradient) == {"a", "rest"}


@pytest.mark.parametrize("name", ["soba", "sustain", "unroll-truncated", "bisls-adam", "bisls-sgd"])
def test_modules_with_batch_norm_and_dropout(name: str) -> None:
    model = net()
    before, random = plain(model.state_dict()), torch.get_rng_state()
    batches = methods.Minibatches(data(), data(), size=16)
    options: dict[str, Any] = {"lower_steps": 2} if "bisls" in name else {}
    if name in ("sustain",):
        options["estimator"] = Implicit(Neumann(2, 0.1))
    records = list(
        methods.run(name, network_problem(), torch.zeros(6), model, iterations=4, batches=batches, **options)
    )
    assert plain(model.state_dict()) == before
    assert torch.equal(random, torch.get_rng_state())
    last = records[-1]
    assert set(last.y) == {key for key, _ in model.named_parameters()}
    assert last.losses.lower != records[0].losses.lower
    missing = Net()
    missing.load_state_dict({**missing.state_dict(), **last.y})


def test_frozen_parameters_of_a_module_stay() -> None:
    model = net(dropout=0.0)
    for p in model.first.parameters():
        p.requires_grad_(False)
    pair = methods.Pair(data(), data())
    (record,) = methods.run("soba", network_problem(), torch.zeros(6), model, iterations=1, batches=[pair])
    assert not any(key.startswith("first") for key in record.y)
    for p in model.parameters():
        p.requires_grad_(False)
    with pytest.raises(TensorError, match="y holds no tensor"):
        methods.run("soba", network_problem(), torch.zeros(6), model, iterations=1)


@pytest.mark.parametrize(
    "wrong", [torch.arange(3), torch.ones(2, dtype=torch.complex64), torch.eye(2).to_sparse(), [], "y"]
)
def test_variables_that_cannot_be_stepped(wrong: Any) -> None:
    with pytest.raises(TensorError, match=r"^y"):
        methods.run("soba", problem_of(b2()), b2().x0, wrong, iterations=1)


@pytest.mark.filterwarnings("ignore:.*does not depend on x")  # said of rows that differentiate by x
@pytest.mark.filterwarnings("ignore:.*sufficient decrease", "ignore:.*slope", "ignore:.*descend")
@pytest.mark.parametrize("name", methods.names())
def test_losses_that_do_not_use_all_they_are_given(name: str) -> None:
    """No mixed derivative; f without x; a part of y that f does not use: zeros, no error."""
    problem = methods.BilevelProblem(
        upper_loss=lambda x, y, _: (y["a"] - 1).square().sum(),
        lower_loss=lambda x, y, _: (y["a"] - 2).square().sum() + y["b"].square().sum(),
    )
    y = {"a": torch.zeros(2), "b": torch.ones(1)}
    *_, record = methods.run(name, problem, torch.ones(2), y, iterations=2)
    assert torch.equal(record.x, torch.ones(2)) or name == "hozog"
    assert bool(record.y["a"].isfinite().all())


def test_wrong_losses() -> None:
    with pytest.raises(ClosureError, match="upper_loss"):
        methods.BilevelProblem(upper_loss=None, lower_loss=lambda x, y, b: y.sum())  # type: ignore[arg-type]
    detached = methods.BilevelProblem(lambda x, y, _: 1.0, lambda x, y, _: y.sum())  # type: ignore[arg-type,return-value]
    with pytest.raises(ClosureError, match="upper_loss returned"):
        next(methods.run("soba", detached, torch.ones(2), torch.ones(2), iterations=1))
