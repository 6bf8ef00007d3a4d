"""Batches: minibatches, blocks, loaders, fresh ones within an iteration, and wrong ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from adaptive_bilevel import methods
from adaptive_bilevel.errors import OptionError
from adaptive_bilevel.hypergradient import Neumann
from tests.methods.helpers import data, network_problem, problem_of
from tests.optim.helpers import net
from tests.problems import b2


def test_minibatches() -> None:
    x = torch.arange(10.0)
    batches = methods.Minibatches({"a": x, "b": [x]}, (x, x), size=(3, 4), seed=1)
    first = batches.draw()
    assert torch.equal(first.upper["a"], first.upper["b"][0]) and first.upper["a"].shape == (3,)
    assert first.lower[0].shape == (4,) and first.upper_id is None
    place = batches.state_dict()
    following = [batches.draw().lower[0] for _ in range(3)]
    batches.load_state_dict(place)
    assert all(torch.equal(a, batches.draw().lower[0]) for a in following)


def test_blocks_are_a_partition() -> None:
    x = torch.arange(10.0)
    batches = methods.Minibatches(x, x, size=(3, 5), blocks=True)
    seen: dict[Any, Tensor] = {}
    for _ in range(100):
        pair = batches.draw()
        assert torch.equal(seen.setdefault(pair.upper_id, pair.upper), pair.upper)
    assert sorted(torch.cat(list(seen.values())).tolist()) == x.tolist() and len(seen) == 4


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"size": 0}, "size"), ({"size": 99}, "only 10"), ({"size": (1, 2, 3)}, "size"), ({"size": 2.5}, "size")],
)
def test_wrong_minibatches(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(OptionError, match=reason):
        methods.Minibatches(torch.ones(10), torch.ones(10), **options)
    with pytest.raises(OptionError, match="first dimension"):
        methods.Minibatches((torch.ones(10), torch.ones(9)), torch.ones(10), size=2)


def test_data_loaders() -> None:
    loader = DataLoader(TensorDataset(*data()), batch_size=16)
    batches = methods.Loaders(loader, loader)
    records = list(methods.run("soba", network_problem(), torch.zeros(6), net(), iterations=7, batches=batches))
    assert len(records) == 7  # three batches an epoch


class Counting:
    """Pairs (f's batch, g's batch), with what was drawn."""

    def __init__(self) -> None:
        self.drawn = 0

    def __iter__(self) -> Iterator[tuple[float, float]]:
        while True:
            self.drawn += 1
            yield float(self.drawn), float(self.drawn)


@pytest.mark.parametrize(("fresh", "drawn"), [(False, 3), (True, 3 * 4)])
def test_fresh_batches(fresh: bool, drawn: int) -> None:
    seen: list[float] = []

    def lower(x: Tensor, y: Tensor, batch: float) -> Tensor:
        seen.append(batch)
        return (y - x - batch).square().sum()

    problem = methods.BilevelProblem(upper_loss=lambda x, y, b: (y.square() + b).sum(), lower_loss=lower)
    batches = Counting()
    options: dict[str, Any] = {"lower_steps": 4, "fresh_batches": fresh, "solver": Neumann(2, 0.1)}
    list(methods.run("stocbio", problem, torch.ones(2), torch.ones(2), iterations=3, batches=batches, **options))
    assert batches.drawn == drawn
    assert len(set(seen)) == drawn


def test_independent_products() -> None:
    """With fresh batches each factor of the random Neumann term gets its own."""
    seen: list[float] = []

    def lower(x: Tensor, y: Tensor, batch: float) -> Tensor:
        seen.append(batch)
        return 0.5 * (y - x).square().sum() * batch

    problem = methods.BilevelProblem(upper_loss=lambda x, y, _: y.square().sum(), lower_loss=lower)
    solver = Neumann(6, 0.01, random=True)
    options: dict[str, Any] = {"solver": solver, "fresh_batches": True, "lower_step": 0.01}
    for _ in methods.run("alset", problem, torch.ones(2), torch.zeros(2), iterations=8, batches=Counting(), **options):
        pass
    assert len(set(seen)) > 8 + 5


@pytest.mark.parametrize("wrong", [3, [1, 2], [(1, 2, 3)], []])
def test_wrong_batches(wrong: Any) -> None:
    with pytest.raises(OptionError, match=r"batches|pair"):
        list(methods.run("soba", problem_of(b2()), b2().x0, b2().y0, iterations=2, batches=wrong))


def test_saga_needs_to_know_the_summand() -> None:
    with pytest.raises(OptionError, match="blocks=True"):
        list(methods.run("saba", problem_of(b2()), b2().x0, b2().y0, iterations=2, batches=[(None, None)]))
