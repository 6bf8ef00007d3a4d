"""`diagnose`: sentences on what limits a run, from an optimizer's record of its last steps."""

from __future__ import annotations

import itertools
import math
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..errors import OptionError
from ..hypergradient.solution import HessianReport
from ..optim.base import AdaptiveOptimizer
from ..optim.conclusion import Past
from ..optim.state import read_states
from ..optim.unwrap import unwrapped
from ..policies import AutoSLS, Outcome
from ..policies.scalars import resolution
from . import stiffness
from .lower import LowerLevel, stability_limit
from .remedies import OUTCOMES, SOLVES
from .upper import UpperOptimizer

__all__ = ["diagnose"]

_SOME, _MOST = 0.1, 0.5
"""Parts of the last steps that are worth a sentence: of what should not be, and of what may be."""


def diagnose(optimizer: Any) -> list[str]:
    """Return sentences on what limits a run, each with a remedy. The list is empty if nothing limits it.

    The sentences are from the last 50 steps. They report failed searches and other steps that moved nothing, steps at
    their bound, many trials, solves at negative curvature or at a singular Hessian, lower losses that x has made too
    steep, slopes that disagree with the hypergradient, losses that rise from step to step, closures that change at the
    same point, steps below rounding, and losses that hardly depend on the upper variable any more. For an upper
    optimizer, they also report on its lower optimizers, and whether these are far from their solution.

    No loss is evaluated. On an accelerator, the call waits for the device. The history is not in ``state_dict``.

    Args:
        optimizer: An optimizer of this package, or an object whose ``optimizer`` is one (an `UpperStep` of TorchOpt, a
            problem of Betty, what a trainer has wrapped around one).

    Raises:
        OptionError: `optimizer` is neither.

    >>> import torch
    >>> from adaptive_bilevel import SLS, diagnose
    >>> x = torch.ones(2, requires_grad=True)
    >>> optimizer = SLS([x])
    >>> diagnose(optimizer)
    ['SLS has taken no step yet: call step(closure) first']
    >>> _ = optimizer.step(lambda: (x**2).sum())
    >>> diagnose(optimizer)
    []
    """
    held = unwrapped(optimizer)
    if not isinstance(held, AdaptiveOptimizer):
        raise OptionError(
            f"diagnose({type(optimizer).__name__}): pass an optimizer of adaptive_bilevel, e.g. diagnose(outer)"
        )
    name, past = type(held).__name__, list(held.history)
    if not past:
        return [f"{name} has taken no step yet: call step(closure) first"]
    found = [f"{name}: {text}" for part in _PARTS for text in part(held, past)]
    if isinstance(held, UpperOptimizer) and isinstance(held.lower, LowerLevel):
        for lower in held.lower.optimizers:
            if isinstance(lower, AdaptiveOptimizer) and lower.history:
                found += _behind(lower, list(lower.history))
                found += [f"lower level: {text}" for text in diagnose(lower)]
            elif isinstance(lower, torch.optim.SGD):
                found += _too_long(lower, past)
    return found


def _of(count: int, past: Sequence[Any], what: str = "steps") -> str:
    return f"{count} of the last {len(past)} {what}"


def _closures(optimizer: AdaptiveOptimizer, past: Sequence[Past]) -> list[str]:
    checks, found = optimizer.closure_checks, []
    if checks.changes:
        found.append("the closure changes from call to call at the same point: draw its batch outside of it")
    if checks.stays:
        found.append("the closure's loss does not follow the parameters: compute it inside of the closure")
    return found


def _outcomes(optimizer: AdaptiveOptimizer, past: Sequence[Past]) -> list[str]:
    outcomes = [int(step.record.outcome) for step in past]
    counts = {outcome: outcomes.count(outcome) for outcome in OUTCOMES}
    return [OUTCOMES[o].format(of=_of(n, past)) for o, n in counts.items() if n > _SOME * len(past)]


def _bounds(optimizer: AdaptiveOptimizer, past: Sequence[Past]) -> list[str]:
    if float(optimizer.param_groups[0]["lr"]) == 0.0:
        return ["lr is 0, so nothing moves: look at the scheduler"]
    if not hasattr(optimizer.policy, "bound"):
        return []
    if isinstance(optimizer.policy, AutoSLS):  # its steps without a search are the bound in any case
        past = [step for step in past if step.record.trials]
    past = [step for step in past if int(step.record.outcome) != Outcome.kept]  # only a search says so
    count = sum(int(s.record.outcome) == Outcome.at_bound for s in past)
    if count <= _MOST * len(past):
        return []
    return [
        f"the step was the bound in {_of(count, past)}: raise lr=, or let it decay more slowly (decay=) for longer ones"
    ]


def _trials(optimizer: AdaptiveOptimizer, past: Sequence[Past]) -> list[str]:
    searched = [step.record for step in past if step.record.outcome != Outcome.search_failed]
    trials = [record.trials for record in searched if record.trials]
    if len(trials) < 3 or statistics.fmean(trials) < 6.0:
        return []
    return [
        f"searches took {statistics.fmean(trials):.1f} trials on average: samples ask for very different steps, so "
        "take larger batches, or a smaller grow="
    ]


def _solves(optimizer: AdaptiveOptimizer, past: Sequence[Past]) -> list[str]:
    reports = [step.hessian for step in past if isinstance(step.hessian, HessianReport)]
    met = [SOLVES[report.status] for report in reports if report.status in SOLVES]
    return [
        f"the solver met {what} in {_of(count, reports, 'solves')}: {remedy}"
        for (what, remedy), count in Counter(met).items()
        if count > _SOME * len(reports)
    ]


def _stiff(optimizer: AdaptiveOptimizer, past: Sequence[Past]) -> list[str]:
    if not isinstance(optimizer, UpperOptimizer):
        return []
    first = {"stiffness": stiffness.init()}
    longest = stiffness.limit(read_states(optimizer.state, first, optimizer._parameters())["stiffness"])
    if math.isinf(longest):
        return []
    return [
        "steps of x have made the lower loss steep: curvatures that were its largest are not resolved any more, so "
        f"upper steps are held to a length of {longest:.2g}. Bound x (project=Box(...) for the logarithm of a "
        "penalty), or scale what x multiplies"
    ]


def _slopes(optimizer: AdaptiveOptimizer, past: Sequence[Past]) -> list[str]:
    ratios = [r for step in past if math.isfinite(r := float(step.record.slope_ratio))]
    far = [r for r in ratios if not 0.5 <= r <= 2.0]
    if len(far) <= _MOST * len(ratios):
        return []
    return [
        "the searched function's slope was far from what the hypergradient promises in "
        f"{_of(len(far), ratios)} (median ratio {statistics.median(ratios):.3g}): check the hypergradient with "
        "hypergradient.check, and give the optimizer the solver that it uses"
    ]


def _noise(optimizer: AdaptiveOptimizer, past: Sequence[Past]) -> list[str]:
    losses = [float(step.loss) for step in past]
    pairs = [(a, b) for a, b in itertools.pairwise(losses) if math.isfinite(a) and math.isfinite(b)]
    rises = [b - a for a, b in pairs if b > a + 64.0 * resolution(a) * abs(a)]
    if len(pairs) < 10 or len(rises) <= 0.3 * len(pairs):
        return []
    rose = f"the loss rose from one step to the next in {_of(len(rises), pairs)}"
    if hasattr(optimizer.policy, "decay"):
        return [f"{rose}: samples disagree, or another level moves. Take larger batches"]
    return [
        f"{rose}, though each step lowered its own sample: samples disagree, or another level moves. Take larger "
        "batches, or a rule whose bound decays (SLSB, SPSB; BiSPS)"
    ]


def _still(optimizer: AdaptiveOptimizer, past: Sequence[Past]) -> list[str]:
    last = list(past)[-10:]
    tiny = sum(_hidden(step) for step in last)
    said = (
        []
        if tiny < max(3, len(last) // 2 + 1)
        else [
            f"the steps promised less than the rounding of the loss in {_of(tiny, last)}: this is a solution, or "
            "the losses hardly depend on x any more (weights behind a saturated sigmoid, say), or float64 is needed to "
            "see further"
        ]
    )
    shared = optimizer.state.get("diagnosis", {})  # type: ignore[call-overload]
    if shared.get("still", 0) >= 3:
        said.append(
            f"the upper variable stands still: it moved by less than 1e-6 of its size in the last {shared['still']} "
            "searches, although the hypergradient promises more. What else is said here names the cause; if nothing "
            "is, scale the upper variables alike"
        )
    return said


def _faded(optimizer: AdaptiveOptimizer, past: Sequence[Past]) -> list[str]:
    last = list(past)[-10:]
    losses, promised = [float(step.loss) for step in last], statistics.median(map(_promised, last))
    rises = [b - a for a, b in itertools.pairwise(losses) if b > a]
    if not isinstance(optimizer, UpperOptimizer) or len(last) < 10 or len(rises) < 3:
        return []
    rise = statistics.median(rises)
    if not (0.0 < promised <= 1e-3 * rise and rise > 1e-6 * max(map(abs, losses))):
        return []
    return [
        f"the last {len(last)} steps promised to lower the loss by {promised:.2g}, and it rose by {rise:.2g} from one "
        f"sample to the next in {len(rises)} of them (medians): it hardly depends on the upper variable any more. If "
        "that feeds a sigmoid, a softmax or an exponential, bound it by project=Box(...), or take more lower steps "
        "before the first upper one"
    ]


def _promised(step: Past) -> float:
    """Return what the step last tried promises; 0 if that is not known."""
    promised = max(float(step.record.step_size), float(step.record.proposed)) * float(step.record.slope)
    return promised if math.isfinite(promised) else 0.0


def _hidden(step: Past) -> bool:
    """Return whether what the step last tried promises is lost in the rounding of the loss."""
    return 0.0 < _promised(step) <= resolution(step.loss) * abs(float(step.loss))


def _behind(lower: AdaptiveOptimizer, past: Sequence[Past]) -> list[str]:
    """Return whether a lower optimizer is still far from its solution: its last step promised much."""
    last = past[-1]
    promised, loss = float(last.record.step_size) * float(last.record.slope), abs(float(last.loss))
    if not (loss > 0.0 and math.isfinite(promised) and promised > 0.1 * loss):
        return []
    return [
        f"the lower level is behind: the last step of {type(lower).__name__} still promised to lower its loss by "
        f"{promised / loss:.0%}. Take more lower steps for each upper one"
    ]


def _too_long(lower: torch.optim.SGD, past: Sequence[Past]) -> list[str]:
    """Return whether gradient descent below diverges at the largest Ritz values of the solves."""
    reports = [step.hessian for step in past if isinstance(step.hessian, HessianReport)]
    largest = [report.norm for report in reports if math.isfinite(report.largest)]
    lr, most = max(float(group["lr"]) for group in lower.param_groups), stability_limit(lower)
    above = [size for size in largest if size > most]
    if len(above) <= _SOME * len(largest):
        return []
    return [
        f"lower level: the lr of SGD, {lr:g}, was too long in {_of(len(above), largest, 'solves')}: the lower Hessian "
        f"had eigenvalues up to {max(above):.3g}, and gradient descent diverges above {most:.3g}. Take SLS or AutoSLS "
        f"for the lower level, or an lr below {lr * most / max(above):.2g}"
    ]


_PARTS: Sequence[Callable[[AdaptiveOptimizer, Sequence[Past]], list[str]]] = (
    _closures,
    _outcomes,
    _bounds,
    _still,
    _faded,
    _solves,
    _stiff,
    _slopes,
    _trials,
    _noise,
)
