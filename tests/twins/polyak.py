"""SPSB, and the bound gamma_b,0 = D / sqrt(G) that SPSB, SLSB and BiSPS estimate."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from . import Direction, Loss, gradient, longest_without_increase

__all__ = ["SPSB", "Bound", "polyak_step"]


@dataclass(frozen=True)
class Bound:
    """gamma_b,0 = D / sqrt(G), from the losses f_j and the slopes n_j of the samples so far and the steps gamma_j.

    G is a decaying mean of the n_j. D^2 is the largest value so far of

        2 sum_j gamma_j (f_j - F) - sum_j gamma_j^2 n_j,        F = (decaying mean of the f_j) + 2 standard errors,

    and at the first sample gamma^2 n_0 for the first bound gamma.
    """

    samples: int = 0
    mean: float = 0.0
    variance: float = 0.0
    G: float = 0.0
    D2: float = 0.0
    sum_gamma_f: float = 0.0
    sum_gamma: float = 0.0
    sum_gamma2_n: float = 0.0

    def see(self, f: float, n: float, first: float) -> Bound:
        """Return the estimates with one more sample; `first` is the first bound."""
        k = self.samples
        w, ahead = 4 / (k + 4), f - self.mean
        mean = self.mean + w * ahead
        variance = (1 - w) * (self.variance + w * ahead * ahead)
        G = self.G + 16 / (k + 16) * (n - self.G)
        standard_error = (variance * (16 / 7 / (k + 1))) ** 0.5
        F = mean + 2 * standard_error
        D2 = 2 * (self.sum_gamma_f - self.sum_gamma * F) - self.sum_gamma2_n
        D2 = max(D2, self.D2) if k > 0 else first * n * first
        return replace(self, samples=k + 1, mean=mean, variance=variance, G=G, D2=D2)

    def take(self, f: float, n: float, gamma: float) -> Bound:
        """Return the estimates after a step of length gamma on that sample."""
        return replace(
            self,
            sum_gamma_f=self.sum_gamma_f + gamma * f,
            sum_gamma=self.sum_gamma + gamma,
            sum_gamma2_n=self.sum_gamma2_n + gamma * gamma * n,
        )

    @property
    def value(self) -> float:
        return float((self.D2 / self.G) ** 0.5)


def polyak_step(f: float, slope: float, bound: Bound, k: int) -> float:
    """Return min{f / slope, gamma_b,0 / sqrt(k + 1)}: c = 1, lower bound 0, eqs. (7) and (12)."""
    return min(f / slope, bound.value * (k + 1) ** -0.5)


class SPSB:
    """x <- x - gamma e, gamma = min{f / <g, d>, gamma_b,0 / sqrt(k + 1)}.

    The first bound is the longest of a, a / 2, ... that does not raise f, from a = f / (.1 <g, d>). k counts the steps,
    or is the number of upper steps if BiSPS sets `clock`.
    """

    def __init__(self, x: Tensor, direction: str = "sgd") -> None:
        self.x, self.direction = x, Direction(direction, x)
        self.bound, self.k, self.step_size = Bound(), 0, 0.0
        self.clock: int | None = None

    def step(self, loss: Loss) -> None:
        f, g = gradient(loss, self.x)
        d, e = self.direction.at(g)
        slope = float(g @ d)
        assert f > 0 and slope > 0
        first = 0.0
        if self.k == 0:
            first = longest_without_increase(lambda a: float(loss(self.x.add(d, alpha=-a))), f, f / slope / 0.1)
        bound = self.bound.see(f, slope, first)
        a = polyak_step(f, slope, bound, self.k if self.clock is None else self.clock)
        if a == 0:
            return  # no first bound: nothing moves, and the sample leaves no trace
        self.x, self.step_size = self.x.add(e, alpha=-a), a
        self.direction.keep(g)
        self.bound, self.k = bound.take(f, slope, a), self.k + 1
