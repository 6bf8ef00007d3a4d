"""Hypergradients as people have them, written to where the optimizers read them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from adaptive_bilevel.errors import HypergradientError
from adaptive_bilevel.hypergradient import assign

SLICES: dict[str, Callable[[Tensor], Tensor]] = {
    "rows": lambda x: x[1:3],
    "a column": lambda x: x[:, 1],
    "an entry": lambda x: x[2, 3],
    "a stride": lambda x: x[::2, 1::2],
    "transposed": lambda x: x.t()[1],
    "a view": lambda x: x.view(-1)[3:7],
    "narrow": lambda x: x.narrow(1, 1, 2),
    "of a slice": lambda x: x[1:][:, 2:],
    "all": lambda x: x[:],
}
PARAMETERS: dict[str, Callable[[], Tensor]] = {
    "contiguous": lambda: torch.zeros(4, 5),
    "transposed": lambda: torch.zeros(5, 4).t(),
    "with gaps": lambda: torch.zeros(4, 10)[:, ::2],
    "with an offset": lambda: torch.zeros(30)[7:27].view(4, 5),
}


NO_VIEW = {("a view", "transposed"), ("a view", "with gaps")}


@pytest.mark.parametrize("of", ["nothing", "another layout", "numbers"])
@pytest.mark.parametrize(("name", "parameter"), [(n, p) for n in SLICES for p in PARAMETERS if (n, p) not in NO_VIEW])
def test_a_slice_gets_its_entries(name: str, parameter: str, of: str) -> None:
    x = PARAMETERS[parameter]().detach().requires_grad_()
    held = {"nothing": None, "another layout": torch.full((5, 4), 7.0).t(), "numbers": torch.full((4, 5), 7.0)}[of]
    x.grad = held
    part = SLICES[name](x)
    h = torch.arange(1.0, part.numel() + 1.0).reshape(part.shape)
    expected = torch.zeros(4, 5) if held is None else held.clone(memory_format=torch.contiguous_format)
    SLICES[name](expected).copy_(h)
    assign([part], [h])
    assert x.grad is not None and torch.equal(x.grad, expected)
    with torch.no_grad():
        assign([SLICES[name](x)], [h])  # a slice that was taken without gradients
    assert torch.equal(x.grad, expected)


def test_parts_of_one_parameter_and_a_graph() -> None:
    x, w = torch.zeros(5, requires_grad=True), torch.ones(3, requires_grad=True)
    assign({"head": x[:2], "tail": x[2:]}, {"head": 2 * w[:2], "tail": w * 3})
    assert torch.equal(x.grad, torch.tensor([2.0, 2.0, 3.0, 3.0, 3.0]))  # type: ignore[arg-type]
    assert x.grad is not None and not x.grad.requires_grad


def test_a_frozen_parameter_keeps_what_it_has() -> None:
    x = torch.zeros(2)
    assign([x, x[:1]], [torch.ones(2), torch.ones(1)])
    assert x.grad is None


@pytest.mark.parametrize(
    ("copied", "h"),
    [(lambda x: x[[0, 1]], torch.ones(2)), (lambda x: x[x > -1], torch.ones(3)), (lambda x: 2 * x, torch.ones(3))],
)
def test_a_copy_is_refused(copied: Any, h: Tensor) -> None:
    x, other = torch.zeros(3, requires_grad=True), torch.zeros(3, requires_grad=True)
    with pytest.raises(HypergradientError, match=r"upper\[1\] is no parameter and no slice"):
        assign([other, copied(x)], [torch.ones(3), h])
    with pytest.raises(HypergradientError, match="shapes"):
        assign([x[:2]], [torch.ones(3)])
    assert x.grad is None and other.grad is None
