"""The rules of adaptive-bilevel as a solver of benchopt's benchmark of bilevel optimization. No step size is given.

Copy this file into ``solvers/`` of a checkout of github.com/benchopt/benchmark_bilevel, and run

    benchopt run . -s adaptive-bilevel -d simulated

The losses are JAX functions there, of arrays or trees of arrays. `Bridge` makes them functions of tensors, with
derivatives of any order.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, ClassVar

import jax
import numpy as np
import torch
from benchopt import BaseSolver
from benchopt.stopping_criterion import SufficientProgressCriterion
from torch import Tensor

from adaptive_bilevel import AutoSLS, BiSLS
from adaptive_bilevel.hypergradient import implicit


class Bridge:
    """A JAX function (start, *arrays) -> tuple of arrays, as a function of tensors with derivatives of any order."""

    def __init__(self, function: Any) -> None:
        self.function, self.compiled = function, jax.jit(function)
        self.inputs = 0  # the number of tensors, known from the first call on

    def __call__(self, start: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        self.inputs = len(tensors)
        found: tuple[Tensor, ...] = _Bridged.apply(self, start, *tensors)
        return found

    @cached_property
    def pulled_back(self) -> Bridge:
        """The function of the arguments and of one cotangent for each output that returns those of the arguments."""

        def pull(start: Any, *arrays: Any) -> Any:
            arguments, cotangents = arrays[: self.inputs], arrays[self.inputs :]
            return jax.vjp(lambda *a: self.function(start, *a), *arguments)[1](tuple(cotangents))

        return Bridge(pull)


class _Bridged(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, bridge: Bridge, start: int, *tensors: Tensor) -> Any:
        ctx.bridge, ctx.start = bridge, start
        ctx.save_for_backward(*tensors)
        arrays = bridge.compiled(start, *(t.detach().numpy() for t in tensors))
        return tuple(torch.from_numpy(np.array(a)) for a in arrays)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        return (None, None, *ctx.bridge.pulled_back(ctx.start, *ctx.saved_tensors, *cotangents))


class Solver(BaseSolver):
    """BiSLS above AutoSLS, both without a number; the hypergradient is implicit differentiation with CG."""

    name = "adaptive-bilevel"
    requirements: ClassVar[list[str]] = ["pip::torch"]  # and adaptive-bilevel: pip install CHECKOUT
    stopping_criterion = SufficientProgressCriterion(patience=100, strategy="callback")
    parameters: ClassVar[dict[str, Any]] = {"direction": ["adam", "sgd"], "n_inner_steps": [10], "batch_size": ["full"]}

    @staticmethod
    def get_next(stop_val: int) -> int:
        return stop_val + 1

    def set_objective(
        self, f_inner: Any, f_outer: Any, n_inner_samples: int, n_outer_samples: int, inner_var0: Any, outer_var0: Any
    ) -> None:
        y0, self.inner_tree = jax.tree_util.tree_flatten(inner_var0)
        x0, self.outer_tree = jax.tree_util.tree_flatten(outer_var0)
        self.starts = [np.array(a) for a in y0], [np.array(a) for a in x0]
        samples = n_inner_samples, n_outer_samples
        self.sizes = [n if self.batch_size == "full" else min(n, self.batch_size) for n in samples]
        self.batches = [max(1, n // size) for n, size in zip(samples, self.sizes, strict=True)]
        self.lower, self.upper = (
            Bridge(self.flat(f, size)) for f, size in zip((f_inner, f_outer), self.sizes, strict=True)
        )
        self.run_once(2)

    def flat(self, loss: Any, size: int) -> Any:
        """Return a loss as a function of the first sample of a batch and of arrays, those of y first."""
        count = len(self.starts[0])

        def of_arrays(start: Any, *arrays: Any) -> Any:
            y = jax.tree_util.tree_unflatten(self.inner_tree, arrays[:count])
            x = jax.tree_util.tree_unflatten(self.outer_tree, arrays[count:])
            return (loss(y, x, start=start, batch_size=size),)

        return of_arrays

    def run(self, callback: Any) -> None:
        draws = torch.Generator().manual_seed(0)
        self.y, self.x = ([torch.from_numpy(a.copy()).requires_grad_() for a in part] for part in self.starts)
        inner = AutoSLS(self.y)
        outer = BiSLS(self.x, lower=inner, direction=self.direction, hypergradient=implicit)

        def closure(level: int, loss: Bridge) -> Any:
            start = self.sizes[level] * int(torch.randint(self.batches[level], (), generator=draws))
            return lambda: loss(start, *self.y, *self.x)[0]

        while callback():
            for _ in range(self.n_inner_steps):
                inner.step(closure(0, self.lower))
            outer.step(closure(1, self.upper))

    def get_result(self) -> dict[str, Any]:
        y, x = ([jax.numpy.asarray(t.detach().numpy()) for t in part] for part in (self.y, self.x))
        unflatten = jax.tree_util.tree_unflatten
        return {"inner_var": unflatten(self.inner_tree, y), "outer_var": unflatten(self.outer_tree, x)}
