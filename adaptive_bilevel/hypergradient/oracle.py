"""A bilevel problem as oracles: values, gradients and products at any point, on a given sample, each of them counted.

The oracles are pure functions of (x, y, sample): tensors are only read, random numbers (dropout) depend on the sample
alone, so that a search, STORM or SPIDER can evaluate a second point on the same sample.

Counting follows the literature's tables: asking twice for the same thing at the same point and sample costs once (so
SOBA's three directions share one gradient of f), and an HVP or JVP includes the graph that it is taken from.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor

from adaptive_bilevel.errors import ClosureError, warn
from adaptive_bilevel.evaluation.counts import Evaluations
from adaptive_bilevel.evaluation.guard import RandomState

from ..evaluation.processes import mean
from ..evaluation.reductions import agreed
from ..evaluation.vectors import Vector
from .curvature import LowerCurvature, PartialGradients, connected_partials, filled, gradients_of, unconnected
from .memo import Memo
from .sample import Batch, Sample

__all__ = ["Loss", "LowerGradients", "Oracle"]

T = TypeVar("T")

Loss: TypeAlias = Callable[[Vector, Vector, Batch], Tensor]


class LowerGradients(NamedTuple):
    """The lower loss and its partial gradients, detached.

    Attributes:
        loss: g(x, y).
        upper: g_x; empty if it was not asked for.
        lower: g_y; empty if it was not asked for.
    """

    loss: Tensor
    upper: Vector
    lower: Vector


class Oracle:
    """The oracles of f and g, and the count of their calls.

    Args:
        upper_loss: f(x, y, batch) of two tuples of tensors, a real scalar.
        lower_loss: g(x, y, batch), likewise.

    Attributes:
        evaluations: Every call so far.

    >>> oracle = Oracle(lambda x, y, _: (y[0] - 1).square().sum() / 2, lambda x, y, _: (y[0] ** 2 - x[0] * y[0]).sum())
    >>> x, y, sample = (torch.tensor([4.0]),), (torch.tensor([2.0]),), Sample()
    >>> oracle.lower_gradients(x, y, sample).lower, oracle.hvp(x, y, sample, (torch.ones(1),))
    ((tensor([0.]),), (tensor([2.]),))
    >>> oracle.evaluations.lower.gradients, oracle.evaluations.lower.hvps
    (1, 1)
    """

    def __init__(self, upper_loss: Loss, lower_loss: Loss) -> None:
        self._losses = {"upper_loss": upper_loss, "lower_loss": lower_loss}
        self.evaluations: Evaluations = Evaluations()
        self._upper: Memo[tuple[Tensor, PartialGradients]] = Memo()
        self._lower: dict[str, Memo[LowerGradients]] = {of: Memo() for of in ("y", "x", "xy")}
        self._products: Memo[tuple[Tensor, LowerCurvature]] = Memo()
        self._direct: bool | None = None  # whether f depends on x; None: not known yet
        self._told = False

    def forget(self) -> None:
        """Drop what is kept of the last points (a graph among it)."""
        self._upper.forget()
        for memo in self._lower.values():
            memo.forget()
        self._products.forget()

    # ------------------------------------------------------------------------------------------ values

    def upper_value(self, x: Vector, y: Vector, sample: Sample) -> Tensor:
        """Return f(x, y)."""
        self.evaluations.upper.values += 1
        with torch.no_grad():
            return agreed(self._loss("upper_loss", x, y, sample.upper, sample.seed))

    def lower_value(self, x: Vector, y: Vector, sample: Sample) -> Tensor:
        """Return g(x, y)."""
        self.evaluations.lower.values += 1
        with torch.no_grad():
            return agreed(self._loss("lower_loss", x, y, sample.lower, sample.seed))

    # ------------------------------------------------------------------------------------------ gradients

    def upper_gradients(self, x: Vector, y: Vector, sample: Sample) -> tuple[Tensor, PartialGradients]:
        """Return f(x, y) and its two partial gradients, one gradient call."""
        known = self._upper.recall(x, y, sample)
        if known is not None:
            return known
        self.evaluations.upper.gradients += 1
        inner, outer = _leaves(x), _leaves(y)
        loss = self._attached("upper_loss", inner, outer, sample.upper, sample.seed)
        partials, self._direct = connected_partials(loss, inner, outer)
        return self._upper.keep(x, y, sample, (agreed(loss), partials))

    def lower_gradients(self, x: Vector, y: Vector, sample: Sample, of: str = "y") -> LowerGradients:
        """Return g(x, y) and its gradient in y, in x, or in both (``of`` "y", "x" or "xy"): one gradient call."""
        known, both = (self._lower[kind].recall(x, y, sample) for kind in (of, "xy"))
        if known is not None:
            return known
        if both is not None:
            return both._replace(lower=()) if of == "x" else both._replace(upper=())
        self.evaluations.lower.gradients += 1
        products = self._products.recall(x, y, sample)
        if products is not None and of == "y":
            found = LowerGradients(products[0], (), products[1].gradient)
        else:
            found = self._lower_gradients(x, y, sample, of)
        return self._lower[of].keep(x, y, sample, found)

    def _lower_gradients(self, x: Vector, y: Vector, sample: Sample, of: str) -> LowerGradients:
        upper, lower = _leaves(x), _leaves(y)  # both, so that a g without x has a graph, and zeros for its gradient
        loss = self._attached("lower_loss", upper, lower, sample.lower, sample.seed)
        wanted = [*(upper if "x" in of else ()), *(lower if "y" in of else ())]
        found = gradients_of([loss], wanted, None, name="lower_loss")
        gradients, first = mean(filled(found, wanted)), len(upper) if "x" in of else 0
        self._look(not first or any(part is not None for part in found[:first]))
        return LowerGradients(agreed(loss), gradients[:first], gradients[first:])

    # ------------------------------------------------------------------------------------------ products

    def hvp(self, x: Vector, y: Vector, sample: Sample, vector: Sequence[Tensor]) -> Vector:
        """Return H v, H = grad^2_yy g."""
        self.evaluations.lower.hvps += 1
        return self._curvature(x, y, sample).hvp(vector)

    def cross_vjp(self, x: Vector, y: Vector, sample: Sample, vector: Sequence[Tensor]) -> Vector:
        """Return C v, C = grad^2_xy g, for v like y."""
        self.evaluations.lower.jvps += 1
        curvature = self._curvature(x, y, sample)
        return self._looked_at(curvature, curvature.cross_vjp(vector))

    def cross_jvp(self, x: Vector, y: Vector, sample: Sample, direction: Sequence[Tensor]) -> Vector:
        """Return C^T d, for d like x."""
        self.evaluations.lower.jvps += 1
        curvature = self._curvature(x, y, sample)
        return self._looked_at(curvature, curvature.cross_jvp(direction))

    def pull_back(self, x: Vector, y: Vector, sample: Sample, vector: Sequence[Tensor]) -> tuple[Vector, Vector]:
        """Return (C v, H v) at once; counts as one JVP and one HVP."""
        self.evaluations.lower.hvps += 1
        self.evaluations.lower.jvps += 1
        curvature = self._curvature(x, y, sample)
        return self._looked_at(curvature, curvature.pull_back(vector))

    def push_forward(
        self, x: Vector, y: Vector, sample: Sample, direction: Sequence[Tensor], vector: Sequence[Tensor]
    ) -> Vector:
        """Return C^T d + H v at once; counts as one JVP and one HVP."""
        self.evaluations.lower.hvps += 1
        self.evaluations.lower.jvps += 1
        curvature = self._curvature(x, y, sample)
        return self._looked_at(curvature, curvature.push_forward(direction, vector))

    def _looked_at(self, curvature: LowerCurvature, product: T) -> T:
        self._look(curvature.mixed)
        return product

    def _look(self, connected: bool) -> None:
        """Say, once, that x is in no loss, where that is so."""
        if not connected and self._direct is False and not self._told:
            self._told = True
            warn(f"{unconnected(False)}.")

    def _curvature(self, x: Vector, y: Vector, sample: Sample) -> LowerCurvature:
        known = self._products.recall(x, y, sample)
        if known is None:
            upper, lower = _leaves(x), _leaves(y)
            loss = self._attached("lower_loss", upper, lower, sample.lower, sample.seed)
            known = self._products.keep(x, y, sample, (agreed(loss), LowerCurvature(loss, upper, lower)))
        return known[1]

    # ------------------------------------------------------------------------------------------ evaluation

    def upper_loss(self, x: Vector, y: Vector, sample: Sample) -> Tensor:
        """Return f(x, y) under the present grad mode; not counted, for whoever counts by itself."""
        return self._loss("upper_loss", x, y, sample.upper, sample.seed)

    def lower_loss(self, x: Vector, y: Vector, sample: Sample) -> Tensor:
        """Return g(x, y), likewise."""
        return self._loss("lower_loss", x, y, sample.lower, sample.seed)

    def _attached(self, name: str, x: Vector, y: Vector, batch: Batch, seed: int) -> Tensor:
        with torch.enable_grad():
            loss = self._loss(name, x, y, batch, seed)
        if not loss.requires_grad:
            raise ClosureError(
                f"{name} returned a loss without a graph: compute it from the x and y that it is given, with gradients "
                "(no .item(), .detach() or torch.no_grad())"
            )
        return loss

    def _loss(self, name: str, x: Vector, y: Vector, batch: Batch, seed: int) -> Tensor:
        with self._seeded({t.device for t in (*x, *y)}, seed):
            loss = self._losses[name](x, y, batch)
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.is_floating_point():
            kind = f"a {loss.dtype} tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
            raise ClosureError(f"{name} returned {kind}: return one real number as a tensor, e.g. loss.mean()")
        return loss if loss.dim() == 0 else loss.reshape(())

    @contextlib.contextmanager
    def _seeded(self, devices: set[torch.device], seed: int) -> Iterator[None]:
        # torch.random.fork_rng with torch.manual_seed does the same and takes .4 ms, longer than a small loss.
        others = sorted((d for d in devices if d.type not in ("cpu", "meta")), key=str)
        state = RandomState(others)
        try:
            torch.default_generator.manual_seed(seed)
            for device in others:
                with torch.device(device):
                    torch.get_device_module(device).manual_seed(seed)
            yield
        finally:
            state.restore()


def _leaves(tensors: Vector) -> Vector:
    return tuple(t.detach().requires_grad_() for t in tensors)
