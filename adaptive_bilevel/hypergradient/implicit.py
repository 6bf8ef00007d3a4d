"""The implicit hypergradient, for code that has none."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple, overload

from torch import Tensor

from adaptive_bilevel.errors import SolverError, warn

from ..evaluation.counts import Counts
from ..evaluation.guard import Guard, RandomState
from ..evaluation.opened import closing
from ..evaluation.parts import any_in_parts
from ..evaluation.processes import Group
from ..evaluation.reductions import agreed
from ..evaluation.vectors import Vector, add
from ..policies.validation import choice
from .curvature import PartialGradients, connected_partials, parted, unconnected
from .difference_products import LowerLoss
from .lanczos import Lanczos
from .last_solution import recall, remember
from .products import PRODUCTS, Curvature, Sampled, curvature_of, refuse_products, remember_without, say_unresolved
from .same_point import following
from .second_derivatives import verify
from .shared_basis import solve
from .solution import LinearSolver, Solution, described, report
from .trees import Closure, Tree, check_callable, check_levels, evaluate, flatten, guarded, same_structure

__all__ = ["ImplicitInfo", "implicit", "implicit_with_info", "upper_part"]

DEFAULT_SOLVER = Lanczos()


class ImplicitInfo(NamedTuple):
    """Details of a hypergradient.

    Attributes:
        solution: The linear solve. ``solution.tensors`` is v, ``solution.status.sentence`` is how it ended.
        upper_loss: f(x, y), detached.
        lower_loss: g(x, y), detached (of the last sample, if several were drawn).
        direct: ``f_x``, the part of h that does not pass through y.
        lower_gradient: ``grad_y g``, small if the lower problem is solved.
        gradients: Number of gradients of f and g.
        hvps: Number of products with H by autograd. A product by differences counts as two gradients instead.
        jvps: Number of products with C by autograd, likewise.
        error: Measured relative error of a product by differences; NaN for products by autograd.
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

    ``upper_closure`` returns f(x, y), and ``lower_closure`` returns g(x, y). H is grad^2_yy g, and C is grad^2_xy g. At
    y = y*(x) with P = H^{-1}, h is the gradient of F(x) = f(x, y*(x)). The sign of C v is minus; eq. (2) of Fan et al.
    (2023), arXiv 2305.18666, has a misprint.

    Each closure is called once, so that dropout draws one mask for each loss and BatchNorm counts one batch. With
    ``Neumann(random=True)``, each product calls the lower closure once more, which may draw a new batch. If the lower
    loss contains a custom ``autograd.Function``, the first call for its lower tensors evaluates the lower loss four
    more times, to compare second derivatives with differences; these evaluations leave no trace.

    No ``.grad`` changes. Only the closures and a random solver draw random numbers. If a loss or a gradient is not
    finite, the result is not finite either, and nothing is raised.

    Args:
        upper_closure: Returns the upper loss. It need not call backward; a backward inside has no effect.
        lower_closure: Returns the lower loss, or the sum of several. As for the upper closure, backward has no effect.
        upper: The tensors of x: a list, ``model.parameters()``, a mapping, or any nesting of these. They must be the
            objects that the closures use, not copies. Frozen and unused tensors have a hypergradient of zero.
        lower: The tensors of y, likewise.
        solver: `Lanczos`, `CG`, `Neumann`, `Identity`, or any `LinearSolver`. `BiSLS` uses the products of `Lanczos`
            again for its response, with the same random numbers in the lower loss. If losses have the same values in
            its step, it uses their derivatives again, too; until then, the graph of the lower gradient is kept.
        initial: Start of the solver, arranged like ``lower``. By default zero, and for ``CG(warm_start=True)`` the last
            solution for these lower tensors in this process. To resume bitwise from a checkpoint, save
            ``info.solution.tensors`` of `implicit_with_info` and pass them here.
        products: How products with H and C are computed: "autograd", "difference" (of two gradients each, for losses
            without second derivatives: fused attention, compiled functions, reentrant checkpoints), or "auto" (by
            differences if autograd has none, with one warning). See `adaptive_bilevel.hypergradient.products`.
        process_group: Processes over which f and g are means; the result is the same on each. None: all processes of
            `torch.distributed`, if it is initialized. "alone": this process.

    Returns:
        The hypergradient, detached: a tuple for a list or an iterator of tensors, else arranged like ``upper``.

    Raises:
        ClosureError: A closure is not callable, does not return a real scalar that requires a gradient, or returns a
            loss that depends on none of the tensors. Buffers and random state are restored, as after any exception.
        TensorError: A level is empty or frozen, holds a sparse, complex or integer tensor, or a tensor occurs twice.
        SolverError: The lower loss contains an operation without second derivatives (for example fused attention), and
            products are "autograd", or differences are not possible: tensors are not leaves, or in half precision.
        OptionError: ``products`` or ``process_group`` has another value.
        ProcessError: The closure of another process raised, or the processes have different parameters.

    Warns:
        AdaptiveBilevelWarning: In these cases. A Neumann series grows, or CG stops at negative or vanishing curvature:
            H is indefinite or singular there, and `Lanczos` should be used. The lower loss has no curvature in y along
            ``grad_y f``, so that h is f_x. A product with H is not finite. The lower gradient does not depend on x,
            often because it was computed from a copy of x. The second derivatives of a custom ``autograd.Function`` are
            wrong, and products are "autograd". Products are computed by differences, or these have an error above 10 %.

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
    """Return the hypergradient of `implicit`, and an `ImplicitInfo` with its details.

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
    refuse_products("implicit", products, (*x, *y))
    with guarded((*x, *y), process_group, solver=described(solver), products=products) as guard:
        step = following(solver, x, y)
        (direct, rhs), reaches, upper_loss = upper_part(guard, upper_closure, x, y, products)
        counts = Counts(gradients=1)
        lower_part = LowerLoss(guard, [(lower_closure, None)])

        def sample() -> Sampled:
            return curvature_of(products, lower_part, x, y, moves=step.wants_graph, evaluated=guard.mark)

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
        step.leave(solution, (upper_loss, direct, rhs), (lower_loss, curvature))
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


def upper_part(
    guard: Guard,
    closure: Closure,
    x: Sequence[Tensor],
    y: Sequence[Tensor],
    products: str,
    random: RandomState | None = None,
) -> tuple[PartialGradients, bool, Tensor]:
    """Return f_x and f_y, whether f depends on x, and f, the mean over processes.

    Args:
        guard: Of both levels.
        closure: Returns f.
        x: The tensors of x.
        y: The tensors of y.
        products: As for `implicit`.
        random: Random state that f is evaluated under; None: as it is.
    """
    before = random or guard.random_state()
    if not any_in_parts((*x, *y)):
        loss = evaluate(guard, closure, "upper_closure", random)
        try:
            return *connected_partials(loss, x, y), agreed(loss)
        except SolverError:
            if products == "autograd":
                raise
    loss, found = guard.gradient(closure, [*x, *y], before)  # what autograd.grad has not, backward may have
    return *parted(found, x, y), agreed(loss)


def _count(counts: Counts, curvature: Curvature) -> None:
    counts.gradients += curvature.gradients
    counts.hvps += curvature.hvps
    counts.jvps += curvature.jvps
