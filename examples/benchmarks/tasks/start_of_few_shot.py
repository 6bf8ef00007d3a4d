"""Few-shot learning with a network below (implicit MAML, Rajeswaran et al., 2019): x is where each episode starts.

lower  g(x, y) = sum over episodes of cross-entropy of network y_e + lambda/2 ||y_e - x||^2     on the support
upper  f(y)    = mean over episodes of the cross-entropy                                        on the queries

An upper iteration takes new episodes, whose networks start at x. The episodes are those of `few_shot`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import data
from adaptive_bilevel import AutoSLS

from .base import Evaluation, Settings
from .few_shot import Episodes, draw_episodes
from .network import RESOLVING, settings_of

EVALUATIONS = 5  # meta-batches


@dataclass
class StartOfFewShot:
    """`upper` is weights of an MLP (with the biases as last rows), `lower` as many for each episode.

    "loss" is the upper loss on new episodes of the training characters after T lower steps from x, "test_loss" and
    "accuracy" the same on characters that are for tests. F is that after 200 more lower steps.
    """

    settings: Settings
    upper: list[Tensor]
    lower: list[Tensor]
    train: Tensor
    test: Tensor
    ways: int
    shots: int
    queries: int
    episodes: int
    pull: float
    now: Episodes | None = field(default=None, init=False)

    def draw(self, drawings: Tensor, generator: torch.Generator) -> Episodes:
        return draw_episodes(drawings, self.episodes, self.ways, self.shots, self.queries, generator)

    def losses(self, drawings: Tensor, networks: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Cross-entropy of each episode, and the share of right answers."""
        output = drawings.flatten(2)
        for i, layer in enumerate(networks):
            output = output.relu() if i else output
            output = output @ layer[..., :-1, :] + layer[..., -1:, :]
        answers = torch.arange(self.ways).repeat_interleave(drawings.shape[1] // self.ways).expand(len(drawings), -1)
        losses = cross_entropy(output.flatten(0, 1), answers.flatten(), reduction="none").unflatten(0, answers.shape)
        return losses.mean(1), (output.argmax(2) == answers).float().mean()

    def upper_loss(self, batch: Episodes) -> Tensor:
        return self.losses(batch.query, self.lower)[0].mean()

    def lower_loss(self, batch: Episodes) -> Tensor:
        return self._fit(batch.support, self.lower)

    def _fit(self, support: Tensor, networks: list[Tensor]) -> Tensor:
        away = sum((y - x).square().sum() for x, y in zip(self.upper, networks, strict=True))
        return self.losses(support, networks)[0].sum() + self.pull / 2 * away

    @torch.no_grad()
    def sample_lower(self, generator: torch.Generator) -> Episodes:
        self.now = self.draw(self.train, generator)
        for x, y in zip(self.upper, self.lower, strict=True):
            y.copy_(x.expand_as(y))
        return self.now

    def sample_upper(self, generator: torch.Generator) -> Episodes:
        assert self.now is not None
        return self.now  # the queries belong to the episodes of the lower level

    def evaluate(self) -> Evaluation:
        return self._scores(self.settings.lower_steps, "")

    def resolve(self) -> Evaluation:
        return self._scores(self.settings.lower_steps + RESOLVING, "resolved_")

    def _scores(self, steps: int, prefix: str) -> Evaluation:
        loss, _ = self._score(self.train, steps)
        test_loss, accuracy = self._score(self.test, steps)
        return {f"{prefix}loss": loss, f"{prefix}test_loss": test_loss, f"{prefix}accuracy": accuracy}

    def _score(self, drawings: Tensor, steps: int) -> tuple[float, float]:
        """Upper loss and share of right answers on episodes that are the same at every evaluation."""
        generator, loss, right = torch.Generator().manual_seed(0), 0.0, 0.0
        for _ in range(EVALUATIONS):
            episodes = self.draw(drawings, generator)
            networks = self._adapted(episodes.support, steps)
            with torch.no_grad():
                losses, share = self.losses(episodes.query, networks)
            loss, right = loss + float(losses.mean()), right + float(share)
        return loss / EVALUATIONS, right / EVALUATIONS

    def _adapted(self, support: Tensor, steps: int) -> list[Tensor]:
        networks = [
            x.detach().expand_as(y).clone().requires_grad_() for x, y in zip(self.upper, self.lower, strict=True)
        ]
        rule: Any = self.lower_rule(networks)
        for _ in range(steps):
            rule.step(lambda: self._fit(support, networks))
        return networks

    def lower_rule(self, params: list[Tensor]) -> torch.optim.Optimizer:
        return AutoSLS(params)


def create(
    seed: int,
    folder: str | Path | None = None,
    *,
    shots: int = 5,
    queries: int = 5,
    episodes: int = 4,
    hidden: int = 32,
    pull: float = 0.1,
    **overrides: Any,
) -> StartOfFewShot:
    """5 characters an episode; `pull` is lambda."""
    train, test = data.characters(folder)
    generator, ways = torch.Generator().manual_seed(seed), 5
    sizes = ((train[0, 0].numel(), hidden), (hidden, ways))
    upper = [(2 * torch.rand(i + 1, o, generator=generator) - 1) / i**0.5 for i, o in sizes]
    return StartOfFewShot(
        settings=settings_of(overrides),
        upper=[tensor.requires_grad_() for tensor in upper],
        lower=[tensor.detach().expand(episodes, -1, -1).clone().requires_grad_() for tensor in upper],
        train=train,
        test=test,
        ways=ways,
        shots=shots,
        queries=queries,
        episodes=episodes,
        pull=pull,
    )
