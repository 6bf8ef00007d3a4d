"""The verdict of `check`: which common mistake explains the gradient."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["CheckReport", "DirectionCheck", "Measurements", "Verdict", "diagnose"]


class Verdict(IntEnum):
    """The finding of `check`.

    Attributes:
        right: The gradient agrees with the finite differences.
        sign: The gradient has the wrong sign.
        implicit_sign: The gradient is f_x + C v, in place of f_x - C v.
        direct_only: The gradient is f_x: the path through y is cut.
        scale: The direction is right, and the length is wrong.
        implicit_scale: The implicit term has a wrong factor.
        direction: The direction is wrong.
        lower_unsolved: The formula is right, but y is not near y*(x).
        noisy: The closures are not deterministic, so that there is no finding.
        inconclusive: The finite differences do not agree with each other, so that there is no finding.
        non_finite: The gradient or a loss is not finite.
        unconnected: Neither loss connects x with y.
    """

    right = 0
    sign = 1
    implicit_sign = 2
    direct_only = 3
    scale = 4
    implicit_scale = 5
    direction = 6
    lower_unsolved = 7
    noisy = 8
    inconclusive = 9
    non_finite = 10
    unconnected = 11


class DirectionCheck(NamedTuple):
    """One direction of a check.

    Attributes:
        name: Name of the direction.
        claimed: <gradient, d>.
        measured: Central difference of F along d.
        uncertainty: Distance of that difference from the one with twice the step.
    """

    name: str
    claimed: float
    measured: float
    uncertainty: float


@dataclass(frozen=True)
class CheckReport:
    """The result of `check`.

    Attributes:
        ok: Whether the gradient passed.
        verdict: The finding.
        sentence: The finding as a sentence, with numbers.
        cosine: Cosine of the angle between gradient and finite differences, over the measured directions.
        scale: Length of the gradient / length of the finite differences.
        sign: The sign of ``cosine``, 1 or -1; 0 if nothing was measured.
        relative_error: ``||gradient - finite differences|| / ||finite differences||``.
        directions: One entry per direction.
        lower_gradient: ``||grad_y g||`` at the present y.
        lower_distance: ``||y - y*(x)|| / ||y*(x)||``.
    """

    ok: bool
    verdict: Verdict
    sentence: str
    cosine: float = math.nan
    scale: float = math.nan
    sign: int = 0
    relative_error: float = math.nan
    directions: tuple[DirectionCheck, ...] = ()
    lower_gradient: float = math.nan
    lower_distance: float = math.nan

    def __bool__(self) -> bool:
        """A report is true if the gradient passed, so that ``assert check(...)`` works."""
        return self.ok

    def __str__(self) -> str:
        lines = [self.sentence]
        if self.directions:
            lines.append(f"  {'direction':<14} {'gradient':>14} {'differences':>14} {'+-':>10}")
        for name, claimed, measured, uncertainty in self.directions:
            lines.append(f"  {name:<14} {claimed:>14.6g} {measured:>14.6g} {uncertainty:>10.1e}")
        return "\n".join(lines)


@dataclass
class Measurements:
    """What was measured: at the present y, at the re-solved one, and along directions.

    Vectors of x are flat. ``direct`` is f_x and ``implicit`` is C H^{-1} f_y. ``unconnected`` is what to say where x is
    in no loss; else it is empty.
    """

    claimed: Tensor
    noise: float
    direct: Tensor
    implicit: Tensor
    lower_gradient: float
    unconnected: str = ""
    resolved_gradient: float = math.nan
    lower_distance: float = math.nan
    solved_direct: Tensor = field(default_factory=lambda: torch.zeros(0))
    solved_implicit: Tensor = field(default_factory=lambda: torch.zeros(0))
    checks: list[DirectionCheck] = field(default_factory=list)
    basis: list[Tensor] = field(default_factory=list)

    def add(self, check: DirectionCheck, direction: Tensor) -> None:
        """Add one measured direction."""
        self.checks.append(check)
        self.basis.append(direction)


def diagnose(m: Measurements, tolerance: float) -> CheckReport:
    """Return the report on ``m``; ``tolerance`` is the relative error that passes."""
    if not bool(torch.isfinite(torch.cat([m.claimed, m.direct, m.implicit])).all()):
        return CheckReport(
            False, Verdict.non_finite, "The gradient or a loss is not finite here.", lower_gradient=m.lower_gradient
        )
    if m.unconnected:
        return CheckReport(
            False,
            Verdict.unconnected,
            f"{m.unconnected[0].upper()}{m.unconnected[1:]}.",
            lower_gradient=m.lower_gradient,
        )
    if not m.checks:
        return CheckReport(
            False,
            Verdict.noisy,
            f"A closure is not deterministic (two evaluations differ by {m.noise:.1e}): fix the batch, and put dropout "
            "into eval mode.",
            lower_gradient=m.lower_gradient,
        )
    claimed, truth, uncertain = (torch.tensor([c[i] for c in m.checks], dtype=torch.float64) for i in (1, 2, 3))
    size, length, doubt = float(truth.norm()), float(claimed.norm()), float(uncertain.norm())
    error = float((claimed - truth).norm()) / max(size, doubt, 1e-300)
    cosine = float(claimed @ truth) / max(size * length, 1e-300)
    scale = length / max(size, 1e-300)
    verdict, sentence = _name_the_fault(m, tolerance, claimed, truth, doubt)
    return CheckReport(
        ok=verdict is Verdict.right,
        verdict=verdict,
        sentence=sentence,
        cosine=cosine,
        scale=scale,
        sign=(cosine > 0) - (cosine < 0),
        relative_error=error,
        directions=tuple(m.checks),
        lower_gradient=m.lower_gradient,
        lower_distance=m.lower_distance,
    )


def _name_the_fault(
    m: Measurements, tolerance: float, claimed: Tensor, truth: Tensor, doubt: float
) -> tuple[Verdict, str]:
    size = float(truth.norm())
    # A gradient is compared with what right code gives at the present y, and that with the truth: so a fault is named
    # although y is not solved exactly, and an unsolved y is not taken for a fault.
    basis = torch.stack(m.basis)
    direct, implicit = basis @ m.direct, basis @ m.implicit
    reference = basis @ (m.solved_direct - m.solved_implicit)
    right = direct - implicit
    if not doubt <= max(tolerance, 0.1) * max(size, float(reference.norm())):  # true also if anything is NaN
        return Verdict.inconclusive, (
            "The finite differences do not agree with each other, so nothing can be said: the lower problem could not "
            f"be re-solved well enough (||grad_y g|| = {m.resolved_gradient:.1e} there), or F is not smooth at this "
            "step; try another step=, more max_iterations or float64."
        )
    passes = _apart(claimed, truth) <= max(tolerance * size, doubt)
    # The reference is trusted where it agrees with the measurement; it does not if g is not convex in y, for example.
    trusted = _apart(reference, truth) <= max(0.05 * size, 2 * doubt)
    if trusted:
        fault = _usual_fault(claimed, direct, implicit, right, passes)
        if fault is not None:
            return fault
    if passes:
        return Verdict.right, f"The gradient is right: relative error {_apart(claimed, truth) / max(size, 1e-300):.1e}."
    if trusted and _apart(claimed, right) <= max(tolerance * float(right.norm()), doubt):
        return Verdict.lower_unsolved, (
            f"The gradient is right for the present y, but the lower problem is not solved: ||grad_y g|| = "
            f"{m.lower_gradient:.1e}, and y is {m.lower_distance:.1%} away from y*(x). Take more lower steps."
        )
    target = right if trusted else truth
    cosine = float(claimed @ target) / max(float(claimed.norm() * target.norm()), 1e-300)
    factor = float(claimed.norm()) / max(float(target.norm()), 1e-300)
    if cosine <= -0.995:
        also = "" if abs(factor - 1) <= tolerance else f", and the scale is off by a factor of about {factor:.2g}"
        return Verdict.sign, f"The sign is flipped: the gradient points uphill{also}."
    scaled = Verdict.scale, f"The direction is right, but the scale is off by a factor of about {factor:.2g}."
    if cosine >= 1 - 1e-6:
        return scaled
    if trusted and (weight := _implicit_weight(claimed, direct, implicit)) is not None:
        return Verdict.implicit_scale, (
            f"The implicit term is off by a factor of about {weight:.2g}: the gradient is f_x - {weight:.2g} C v. "
            "Look at the scale of the inverse (a Neumann sum without its step, an identity), or at its accuracy."
        )
    if cosine >= 0.995:
        return scaled
    return Verdict.direction, (
        f"The direction is wrong (cosine {cosine:.2f}): the gradient is no combination of f_x and C v. Look for a "
        "detached tensor, a different batch, or an inverse that is not solved."
    )


def _usual_fault(
    claimed: Tensor, direct: Tensor, implicit: Tensor, right: Tensor, passes: bool
) -> tuple[Verdict, str] | None:
    """Return the mistake that gives exactly this gradient, if one does."""
    size = float(claimed.norm()) + float(right.norm())
    no_direct = ", which is zero" if float(direct.norm()) <= 1e-9 * size else ""
    # How near counts: no solver enters the direct part; the others carry the error of the user's solver.
    suspects = (
        (
            1e-3,
            Verdict.direct_only,
            direct,
            f"The gradient is the direct part f_x only{no_direct}: the path through y*(x) is missing.",
        ),
        (0.03, Verdict.sign, -right, "The sign is flipped: the gradient points uphill."),
        (
            0.03,
            Verdict.implicit_sign,
            direct + implicit,
            "The implicit term has the wrong sign: the gradient is f_x + C v, right is f_x - C v.",
        ),
    )
    near, verdict, suspect, sentence = min(suspects, key=lambda s: _apart(claimed, s[2]))
    gap = _apart(suspect, right)
    # A gradient that passes is accused only if the coincidence is exact: the implicit term may be a small part of it,
    # but that is no excuse for its sign.
    accused = gap > 1e-4 * size and _apart(claimed, suspect) <= (1e-3 if passes else near) * gap
    return (verdict, sentence) if accused else None


def _implicit_weight(claimed: Tensor, direct: Tensor, implicit: Tensor) -> float | None:
    """Return s if the gradient is f_x - s C v to a per cent of the implicit term."""
    square = float(implicit @ implicit)
    if square == 0.0:
        return None
    weight = float((direct - claimed) @ implicit) / square
    rest = _apart(claimed, direct - weight * implicit)
    return weight if rest <= 0.02 * max(abs(weight), 1.0) * math.sqrt(square) else None


def _apart(left: Tensor, right: Tensor) -> float:
    return float((left - right).norm())
