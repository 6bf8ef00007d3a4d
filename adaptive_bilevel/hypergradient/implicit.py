"""The implicit hypergradient, for code that brings none of its own."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple, overload

from torch import Tensor

from adaptive_bilevel.errors import SolverError, warn

from ..evaluation.counts import Counts
from ..evaluation.guard import Guard, closing
from ..evaluation.processes import Group
from ..evaluation.reductions import agreed
from ..evaluation.tensors import gradients_of
from ..evaluation.vectors import Vector, add
from ..policies.validation import choice
from .curvature import PartialGradients, connected_partials, unconnected
from .difference_products import LowerLoss
from .lanczos import Lanczos
from .last_solution import recall, remember
from .products import PRODUCTS, Curvature, Sampled, curvature_of, remember_without, say_unresolved
from .second_derivatives import verify
from .shared_basis import solve
from .solution import LinearSolver, Solution, report
from .trees import Closure, Tree, check_callable, check_levels, evaluate, flatten, guarded, same_structure

__all__ = ["ImplicitInfo", "implicit", "implicit_with_info"]

DEFAULT_SOLVER = Lanczos()


class ImplicitInfo(NamedTuple):
    """How a hypergradient came about.

    Attributes:
        solution: The linear solve: ``solution.tensors`` is v, ``solution.status.sentence`` says how it ended.
        upper_loss: f(x, y), detached.
        lower_loss: g(x, y), detached (of the last sample, if several were drawn).
        direct: ``f_x``, the part that does not go through y.
        lower_gradient: ``grad_y g``, small if the lower problem is solved.
        gradients: Number of gradients taken (of f and of g together).
        hvps: Number of products with H; 0 where products are differences, of two gradients each.
        jvps: Number of products with C; likewise.
        error: The relative error of a product by differences, as measured; NaN where products are those of autograd.
    """

    solution: Solution
    upper_loss: Tensor
    lower_loss: Tensor
    direct: Vector
    lower_gradient: Vector
    gradients: int
    hvps: int
    jvps: int
    error: float = math.nan


@overload
def implicit(
    upper_closure: Closure,
    lower_closure: Closure,
    upper: Sequence[Tensor] | Iterator[Tensor],
    lower: Tree,
    solver: LinearSolver = ...,
    *,
    initial: Tree | None = ...,
    process_group: Group = ...,
    products: str = ...,
) -> tuple[Tensor, ...]: ...
@overload
def implicit(
    upper_closure: Closure,
    lower_closure: Closure,
    upper: Tree,
    lower: Tree,
    solver: LinearSolver = ...,
    *,
    initial: Tree | None = ...,
    process_group: Group = ...,
    products: str = ...,
) -> Tree: ...
def implicit(
    upper_closure: Closure,
    lower_closure: Closure,
    upper: Tree,
    lower: Tree,
    solver: LinearSolver = DEFAULT_SOLVER,
    *,
    initial: Tree | None = None,
    process_group: Group = None,
    products: str = "auto",
) -> Tree:
    """Return the hypergradient ``h = grad_x f - C v``, with ``v = P grad_y f`` and P the solver's inverse of H.

    Here f(x, y) is what ``upper_closure`` returns, g(x, y) what ``lower_closure`` returns, H = grad^2_yy g and
    C = grad^2_xy g. At y = y*(x) with P = H^{-1} this is the gradient of F(x) = f(x, y*(x)). The right sign is minus;
    eq. (2) of Fan et al. (2023), arXiv 2305.18666, prints plus.

    Each closure is called exactly once, so that dropout draws one mask per loss and BatchNorm counts one batch; with
    ``Neumann(random=True)`` the lower one is called once more per product, and may draw a new batch each time. (And the
    first time for some lower tensors, where the lower loss holds a custom ``autograd.Function``, four times more, which
    leave no trace: its second derivatives are compared with differences.) No
    ``.grad`` is touched, and no random number is drawn beyond what the closures and a random solver draw. Nothing is
    raised on losses or gradients that are not finite: the result then is not finite either, for the optimizer to see.

    Args:
        upper_closure: Returns the upper loss. A backward inside has no effect, as in the optimizers.
        lower_closure: Returns the lower loss (the sum of them, if there are several), likewise.
        upper: The tensors of x: a list, ``model.parameters()``, a mapping, or any nesting of these. They must be the
            very objects that the closures use. Frozen ones, and those a loss does not use, contribute zeros.
        lower: The tensors of y, likewise.
        solver: `Lanczos`, `CG`, `Neumann`, `Identity`, or any `LinearSolver`. The products of `Lanczos` also serve
            the response of a `BiSLS` above these lower tensors, which sees the lower loss with the same random numbers.
        initial: Where the solver starts, arranged like ``lower``. By default zero; with ``CG(warm_start=True)`` the
            last solution that was found for these lower tensors in this process. To resume bitwise from a checkpoint,
            save ``info.solution.tensors`` of `implicit_with_info` and pass them here.
        products: How products with H and C are taken: "autograd", "difference" (of two gradients each, for losses
            without second derivatives: fused attention, compiled functions, reentrant checkpoints), or "auto": by
            differences where autograd has none, which is said once. See `adaptive_bilevel.hypergradient.products`.
        process_group: The processes whose losses add up: f and g are the means of theirs, and the result is the same on
            each. None: all of `torch.distributed`, where that was begun. "alone": this one.

    Returns:
        The hypergradient, detached: a tuple for a list or an iterator of tensors, else arranged like ``upper``.

    Raises:
        ClosureError: A closure is not callable, returned no attached real scalar, or its loss depends on none of the
            tensors. As after any exception, buffers and random state are what they were before the call.
        TensorError: A level is empty or frozen, holds a sparse, complex or integer tensor, or a tensor occurs twice.
        SolverError: The lower loss holds an operation without second derivatives (fused attention, say), and products
            are "autograd", or tensors are no leaves or in half precision, where no differences can be taken.
        OptionError: ``products`` or ``process_group`` is none of the above.
        ProcessError: The closure of another process raised, or the processes have different parameters.

    Warns:
        AdaptiveBilevelWarning: A Neumann series was stopped because it grows, or CG at negative or vanishing curvature:
            H is indefinite or singular here. The default, `Lanczos`, holds there. Or the lower loss has no curvature in
            y along ``grad_y f``, so that h is its direct part; or a product with H is not finite. Or the lower gradient
            has no path to x (mostly it was computed from a copy of x), so that the hypergradient is f_x alone. Or the
            second derivatives of a custom ``autograd.Function`` are wrong, where products are "autograd". Or products
            are differences from now on, or such differences are wrong by more than 10 %.

    >>> import torch
    >>> x, y = torch.tensor([4.0], requires_grad=True), torch.tensor([2.0], requires_grad=True)  # y*(x) = x / 2
    >>> f = lambda: ((y - 1) ** 2 / 2 + x**2 / 20).sum()
    >>> g = lambda: (y**2 - x * y).sum()
    >>> implicit(f, g, [x], [y])
    (tensor([0.9000]),)
    """
    return _differentiate(upper_closure, lower_closure, upper, lower, solver, initial, process_group, products)[0]


def implicit_with_info(
    upper_closure: Closure,
    lower_closure: Closure,
    upper: Tree,
    lower: Tree,
    solver: LinearSolver = DEFAULT_SOLVER,
    *,
    initial: Tree | None = None,
    process_group: Group = None,
    products: str = "auto",
) -> tuple[Tree, ImplicitInfo]:
    """Return what `implicit` returns, and an `ImplicitInfo` on how it came about.

    Arguments and errors are those of `implicit`.

    >>> import torch
    >>> x, y = torch.tensor([4.0], requires_grad=True), torch.tensor([2.0], requires_grad=True)
    >>> h, info = implicit_with_info(lambda: (y**2).sum(), lambda: (y**2 - x * y).sum(), [x], [y])
    >>> info.solution.status.name, info.solution.tensors, info.hvps
    ('converged', (tensor([2.]),), 1)
    """
    return _differentiate(upper_closure, lower_closure, upper, lower, solver, initial, process_group, products)


@closing
def _differentiate(
    upper_closure: Closure,
    lower_closure: Closure,
    upper: Tree,
    lower: Tree,
    solver: LinearSolver,
    initial: Tree | None,
    process_group: Group,
    products: str,
) -> tuple[Tree, ImplicitInfo]:
    x, structure = flatten(upper, "upper")
    y, _ = flatten(lower, "lower")
    check_levels(x, y)
    start = None if initial is None else flatten(initial, "initial")[0]
    if start is None and solver.warm_start:
        start = recall(y)
    check_callable(upper_closure, "upper_closure")
    check_callable(lower_closure, "lower_closure")
    choice("implicit", "products", products, PRODUCTS)
    with guarded((*x, *y), process_group) as guard:
        (direct, rhs), reaches, upper_loss = _upper_part(guard, upper_closure, x, y, products)
        counts = Counts(gradients=1)
        lower_part = LowerLoss(guard, [(lower_closure, None)])

        def sample() -> Sampled:
            return curvature_of(products, lower_part, x, y, evaluated=guard.mark)

        def sampled(v: Vector) -> Vector:
            curvature = sample().curvature
            product = curvature.hvp(v)
            _count(counts, curvature)
            if not curvature.exact:
                guard.recall()
            return product

        if solver.resamples:
            solution = solver.solve(sampled, rhs, start)
            lower_loss, curvature, graph = sample()
        else:
            random = guard.random_state()
            lower_loss, curvature, graph = sample()
            solution = solve(solver, curvature.hvp, rhs, y, lower_loss, start, random)
        h = add(direct, curvature.cross_vjp(solution.tensors), -1.0)
        _count(counts, curvature)
        if curvature.exact:
            guard.mark()  # the solver may have drawn random numbers; replays have, too
            wrong = None if solver.resamples or graph is None else verify(guard, lower_closure, graph, x, y)
            if wrong is not None and products == "auto":
                remember_without(y, wrong)
                again = LowerLoss(guard, [(lower_closure, random)])
                lower_loss, curvature, _ = curvature_of("difference", again, x, y)
                solution = solve(solver, curvature.hvp, rhs, y, lower_loss, start, random)
                h = add(direct, curvature.cross_vjp(solution.tensors), -1.0)
                _count(counts, curvature)
            elif wrong is not None:
                warn(str(wrong))
    say_unresolved(y, curvature.error)
    if not curvature.mixed:
        warn(f"implicit: {unconnected(reaches)}.")
    if solver.warm_start:
        remember(y, solution.tensors)
    report(solver, solution, h)
    info = ImplicitInfo(
        solution=solution,
        upper_loss=upper_loss,
        lower_loss=lower_loss,
        direct=direct,
        lower_gradient=curvature.gradient,
        gradients=counts.gradients,
        hvps=counts.hvps,
        jvps=counts.jvps,
        error=curvature.error,
    )
    return same_structure(structure, h), info


def _upper_part(
    guard: Guard, closure: Closure, x: Sequence[Tensor], y: Sequence[Tensor], products: str
) -> tuple[PartialGradients, bool, Tensor]:
    """Return f_x and f_y, whether f depends on x, and f, the mean over processes."""
    before = guard.random_state()
    loss = evaluate(guard, closure, "upper_closure")
    try:
        return *connected_partials(loss, x, y), agreed(loss)
    except SolverError:
        if products == "autograd":
            raise
    _, found = guard.gradient(closure, [*x, *y], before)  # what autograd.grad has not, backward may have
    both = tuple(gradients_of([*x, *y], [*x, *y], found))
    return PartialGradients(both[: len(x)], both[len(x) :]), any(g is not None for g in found[: len(x)]), agreed(loss)


def _count(counts: Counts, curvature: Curvature) -> None:
    counts.gradients += curvature.gradients
    counts.hvps += curvature.hvps
    counts.jvps += curvature.jvps
