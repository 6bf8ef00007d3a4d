"""What `diagnose` says of outcomes and of what solvers have met, each with a remedy."""

from __future__ import annotations

from ..hypergradient.solution import SolverStatus
from ..policies import Outcome

__all__ = ["OUTCOMES", "SOLVES"]

OUTCOMES = {
    Outcome.search_failed: (
        "searches failed in {of}: no step gave sufficient decrease, and nothing moved. Compare the gradient with the "
        "loss (of an upper level by hypergradient.check), or, near a solution, use float64"
    ),
    Outcome.no_descent: (
        "the direction did not descend in {of}, and nothing moved. The hypergradient and the response disagree: use "
        "one sample and one solver for both, and take more lower steps"
    ),
    Outcome.zero_gradient: (
        "the gradient was zero in {of}, and nothing moved. That is a solution, or the loss does not depend on the "
        "parameters: compute it from the very tensors, not from copies"
    ),
    Outcome.non_finite: (
        "loss or gradient was not finite in {of}, and nothing moved. Look at the data and the loss at the present point"
    ),
    Outcome.undone: (
        "steps whose length was kept were undone in {of}, since the loss did not fall: search in every step, "
        'pace="every"'
    ),
    Outcome.returned: (
        "the run went back to an earlier point in {of}, since the loss had left all of its recent values. Take more "
        "lower steps, if there is a lower level, or see whether x can take all curvature from the lower loss"
    ),
    Outcome.below_lower_bound: (
        "the loss was at or below lower_bound in {of}. Give lower_bound= a number that it never falls below"
    ),
}

_DEFAULT_SOLVER = "leave solver= out (Lanczos holds there), or regularize the lower loss"

SOLVES = {
    SolverStatus.negative_curvature: ("negative curvature", _DEFAULT_SOLVER),
    SolverStatus.vanishing_curvature: ("a singular Hessian", _DEFAULT_SOLVER),
    SolverStatus.indefinite: (
        "negative curvature",
        "Lanczos holds there, by 1/|t| at an eigenvalue t; solve the lower level further, or regularize it, for the "
        "inverse itself",
    ),
    SolverStatus.singular: (
        "a singular Hessian, or directions flatter than it resolves,",
        "Lanczos holds there, by a bounded solution; regularize the lower loss for the inverse itself",
    ),
    SolverStatus.flat: ("no curvature at all", "the lower loss is linear in y and has no minimizer: look at it"),
    SolverStatus.diverging: (
        "a series that grows",
        "give Neumann a smaller scale=, or leave solver= out for Lanczos",
    ),
    SolverStatus.asymmetric: (
        "products of no symmetric matrix",
        "let the lower closure use one batch and one dropout mask in each evaluation",
    ),
    SolverStatus.iteration_limit: (
        "its iteration limit",
        "raise max_iterations=, or scale the lower variables alike",
    ),
    SolverStatus.non_finite: ("numbers that are not finite", "look at the lower loss at the present point"),
}
"""What a solve has met, and the remedy. `indefinite` and `singular` are known to `Lanczos` alone."""
