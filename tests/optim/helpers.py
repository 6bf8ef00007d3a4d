"""The single-level optimizers, with what the generic tests need to know of each."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adaptive_bilevel import SLS, SLSB, SPSB, AutoSLS, DecSPS, SPSMax


@dataclass(frozen=True)
class OptimizerInfo:
    """One optimizer with one set of options.

    Attributes:
        cls: The class.
        options: Keywords beside lr.
        searches: Whether it makes trials.
        decays: Whether its own bound decays.
    """

    cls: type[Any]
    options: dict[str, Any] = field(default_factory=dict)
    searches: bool = False
    decays: bool = False

    @property
    def name(self) -> str:
        return "-".join([self.cls.__name__, *(str(v) for v in self.options.values())])

    def make(self, params: Iterable[Any], lr: float | None = 0.1, **more: Any) -> Any:
        return self.cls(params, lr, **{**self.options, **more})


CLASSES = [
    OptimizerInfo(SPSMax),
    OptimizerInfo(DecSPS, decays=True),
    OptimizerInfo(SPSB, decays=True),
    OptimizerInfo(SLS, searches=True),
    OptimizerInfo(SLSB, searches=True, decays=True),
    OptimizerInfo(AutoSLS, searches=True),
]
INFOS = [
    *CLASSES,
    OptimizerInfo(SPSB, {"direction": "adam"}, decays=True),
    OptimizerInfo(SLS, {"direction": "adam"}, searches=True),
    OptimizerInfo(AutoSLS, {"direction": "adam"}, searches=True),
]

every_class = pytest.mark.parametrize("info", CLASSES, ids=lambda i: i.name)
every_optimizer = pytest.mark.parametrize("info", INFOS, ids=lambda i: i.name)
every_search = pytest.mark.parametrize("info", [i for i in INFOS if i.searches], ids=lambda i: i.name)
every_polyak = pytest.mark.parametrize("info", [i for i in INFOS if not i.searches], ids=lambda i: i.name)


class Net(nn.Module):
    """A small classifier with all that an extra evaluation can disturb: batch norm, dropout, a buffer of its own."""

    calls: Tensor

    def __init__(self, dropout: float = 0.3) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.norm = nn.BatchNorm1d(8)
        self.dropout = nn.Dropout(dropout)
        self.second = nn.Linear(8, 3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1  # replaced, not changed in place
        return self.second(self.dropout(torch.relu(self.norm(self.first(x)))))


def batches(count: int, seed: int = 1) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(16, 6, generator=generator), torch.randint(3, (16,), generator=generator)) for _ in range(count)
    ]


def net(seed: int = 0, dropout: float = 0.3) -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Net(dropout)


def closure_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Callable[[], Tensor]:
    x, target = batch
    return lambda: nn.functional.cross_entropy(model(x), target)


def plain(state: Any) -> Any:
    """Everything that a training run carries on, as nested plain values that compare bitwise."""
    if isinstance(state, Tensor):
        return (str(state.dtype), tuple(state.shape), state.detach().clone().contiguous().flatten().tolist())
    if isinstance(state, dict):
        return {str(k): plain(v) for k, v in state.items()}
    if isinstance(state, (list, tuple)):
        return [plain(v) for v in state]
    return repr(state)


def snapshot(model: nn.Module, *optimizers: torch.optim.Optimizer) -> Any:
    """Parameters, buffers, gradients, random state and optimizer state."""
    return plain(
        {
            "model": model.state_dict(),
            "grad": [p.grad for p in model.parameters()],
            "rng": torch.get_rng_state(),
            "state": [o.state_dict() for o in optimizers],
        }
    )


def run(optimizer: Any, model: nn.Module, data: Iterable[tuple[Tensor, Tensor]]) -> list[float]:
    return [float(optimizer.step(closure_of(model, batch))) for batch in data]


def quadratic(x: Tensor) -> Tensor:
    return (torch.linspace(1.0, 4.0, x.numel()) * x.flatten() ** 2).sum()


def leaf(*values: float, dtype: torch.dtype | None = None) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values or (3.0, 2.0), dtype=dtype))
