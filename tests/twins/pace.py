"""When BiSLS keeps a length, and when it undoes a step whose length was kept."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from torch import Tensor

from . import EPS

__all__ = ["Pace"]


@dataclass
class Pace:
    """A search in every 1st, 2nd, 4th or 8th step.

    In between, a = a_s min{1, sqrt(s_s / s)}, a_s being the last searched step and s = <h, d>. The number doubles with
    each search that finds .5 to 2 times that, stays with a longer step, and is 1 after a shorter one. Every step is
    searched while no trial was rejected, or samples disagree: values of f leave more than half of the decreases of
    searches unconfirmed, or the sum M of f_k - f_{k+1} - .1 a_k s_k is negative. So is one at which f is above the last
    16, s above 4 times s_s, or h has more than 2 times or less than 1/2 of the nonzero entries of before.

    So is every step while, of the last 16, the kept ones have sum (f_k - f_{k+1}) / sum a_k s_k less than 1/4 of what
    the searched ones have. Nor is one kept after a search whose slope is not .5 to 2 times s.

    A kept step is undone, x and y, if f falls by less than .1 a s, and as a part r of a s by less than 2 min - max of
    the last 16 r.
    """

    gap: int = 1
    since: int = 0
    a: float = 0.0
    s: float = 0.0
    entries: int = 0
    losses: list[float] = field(default_factory=list)
    falls: list[float] = field(default_factory=list)
    steps: list[tuple[bool, float, float]] = field(default_factory=list)
    unconfirmed: float = 0.0
    decreases: float = 0.0
    M: float = 0.0
    promise: float = 0.0
    phi: float | None = None
    before: tuple[Tensor, Tensor] | None = None
    agreed: bool = True
    late: bool = False
    undone: bool = False

    @property
    def agree(self) -> bool:
        return self.unconfirmed <= self.decreases / 2 and self.M >= 0

    @property
    def is_late(self) -> bool:
        kept, searched = ([s for s in self.steps if s[0] == kind] for kind in (True, False))
        if not kept or not searched:
            return False
        rate, usual = (sum(fall for _, fall, _ in s) / sum(a for _, _, a in s) for s in (kept, searched))
        return rate < usual / 4

    def was_bad(self, f: float) -> bool:
        """Return whether the last step is to be undone."""
        if self.before is None:
            return False
        fall = self.losses[-1] - f
        return fall + EPS * abs(f) < 0.1 * self.promise and (
            not self.falls or fall < (2 * min(self.falls) - max(self.falls)) * self.promise
        )

    def undo(self) -> tuple[Tensor, Tensor]:
        before = self.before
        assert before is not None
        self.give_up()
        return before

    def give_up(self) -> None:
        """Search in the next step; f was not one of the run."""
        self.before, self.promise, self.phi, self.gap, self.since = None, 0.0, None, 1, 0
        self.undone = True

    def see(self, f: float) -> None:
        """Compare f with what the last step has promised."""
        self.agreed, self.late = self.agree, self.is_late
        if self.promise > 0:
            last = self.losses[-1]
            self.M += last - f - 0.1 * self.promise + EPS * abs(last)
            self.falls = [*self.falls, (last - f) / self.promise][-16:]
            self.steps = [*self.steps, (self.before is not None, last - f, self.promise)][-16:]
        if self.phi is not None and self.losses[-1] > self.phi:
            A = self.losses[-1] - self.phi
            self.unconfirmed += min(max(abs(f - self.phi) - EPS * max(abs(f), abs(self.phi)), 0.0), A)
            self.decreases += A

    def length(self, f: float, s: float, h: Tensor, rejected: bool) -> float | None:
        """Return the length to keep, None for a search."""
        entries = int(h.count_nonzero())
        if self.a == 0 or self.undone or self.since + 1 >= self.gap or self.late:
            return None
        if not (rejected and self.agreed and self.agree):
            return None
        if f > max(self.losses) or s > 4 * self.s or not self.entries / 2 <= entries <= 2 * self.entries:
            return None
        return self.kept(s)

    def kept(self, s: float) -> float:
        return self.a * min(1.0, math.sqrt(self.s / s))

    def add(self, f: float) -> None:
        """Take note of a step."""
        self.undone = False
        self.losses = [*self.losses, f][-16:]
        self.before, self.promise, self.phi = None, 0.0, None

    def keep(self, a: float, s: float, x: Tensor, y: Tensor) -> None:
        """Take note of a kept step from (x, y)."""
        self.since, self.before, self.promise = self.since + 1, (x, y), a * s

    def search(self, a: float, s: float, phi: float, h: Tensor, slope: float) -> None:
        """Take note of a search along a slope that ended at a, where f is phi; 0 if it failed."""
        self.since = 0
        if not 0.5 * (1 - 1e-6) <= slope / s <= 2 * (1 + 1e-6):
            self.gap, self.promise = 1, a * s
            return
        ratio = a / self.kept(s) if self.a > 0 else 0.0
        if a == 0 or not self.agree or ratio < 0.5 * (1 - 1e-6):
            self.gap = 1
        elif ratio <= 2 * (1 + 1e-6):
            self.gap = min(2 * self.gap, 8)
        if a > 0:
            self.a, self.s, self.entries, self.promise, self.phi = a, s, int(h.count_nonzero()), a * s, phi
