"""Few-shot learning: the upper level learns an embedding, the lower level fits a linear head for each episode.

lower  g(x, y) = sum over episodes of 1/(2n) sum ||y_e' phi_x(a) - onehot||^2 + lambda/2 ||y_e||^2    on the support
upper  f(x, y) = mean over episodes of the same without lambda                                       on the queries

An episode is a draw of `ways` characters with `shots` drawings each for the support; an upper iteration takes several,
all new, so that its lower variables start at zero again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import data
from adaptive_bilevel import AutoSLS

from .base import Evaluation, Settings, uniform_layers

EVALUATIONS = 10  # meta-batches


class Episodes(NamedTuple):
    """Drawings, (episodes, ways * drawings, height, width); the labels are the same in all episodes."""

    support: Tensor
    query: Tensor


def draw_episodes(
    drawings: Tensor, count: int, ways: int, shots: int, queries: int, generator: torch.Generator
) -> Episodes:
    """`count` episodes of `ways` characters, of which `shots` and `queries` drawings each are chosen."""
    chosen = [
        drawings[torch.randperm(len(drawings), generator=generator)[:ways]][
            :, torch.randperm(drawings.shape[1], generator=generator)[: shots + queries]
        ]
        for _ in range(count)
    ]
    content = torch.stack(chosen)  # episodes, ways, drawings, height, width
    return Episodes(content[:, :, :shots].flatten(1, 2), content[:, :, shots:].flatten(1, 2))


@dataclass
class FewShot:
    """`upper` is the embedding; `lower` is episodes x (features + 1) x ways, at zero when an iteration begins.

    "loss" is the upper loss on new episodes of the training characters after the lower steps of an iteration,
    "test_loss" and "accuracy" the same on characters that are for tests.
    """

    settings: Settings
    network: nn.Module
    upper: list[Tensor]
    lower: list[Tensor]
    train: Tensor
    test: Tensor
    ways: int
    shots: int
    queries: int
    episodes: int
    ridge: float = 1e-2
    now: Episodes | None = field(default=None, init=False)

    def draw(self, drawings: Tensor, count: int, generator: torch.Generator) -> Episodes:
        return draw_episodes(drawings, count, self.ways, self.shots, self.queries, generator)

    def features(self, drawings: Tensor) -> Tensor:
        embedded = self.network(drawings.flatten(0, 1)).unflatten(0, drawings.shape[:2])
        return torch.cat([embedded, embedded.new_ones(*embedded.shape[:2], 1)], dim=2)

    def targets(self, each: int) -> Tensor:
        return torch.eye(self.ways, dtype=self.lower[0].dtype).repeat_interleave(each, dim=0)

    def upper_loss(self, batch: Episodes) -> Tensor:
        errors = self.features(batch.query) @ self.lower[0] - self.targets(self.queries)
        return errors.square().sum(2).mean() / 2

    def lower_loss(self, batch: Episodes) -> Tensor:
        return self._fit(self.features(batch.support), self.lower[0])

    def _fit(self, features: Tensor, heads: Tensor) -> Tensor:
        errors = features @ heads - self.targets(self.shots)
        return errors.square().sum(2).mean(1).sum() / 2 + self.ridge / 2 * heads.square().sum()

    @torch.no_grad()
    def sample_lower(self, generator: torch.Generator) -> Episodes:
        self.now = self.draw(self.train, self.episodes, generator)
        self.lower[0].zero_()
        return self.now

    def sample_upper(self, generator: torch.Generator) -> Episodes:
        assert self.now is not None
        return self.now  # the queries belong to the episodes of the lower level

    def evaluate(self) -> Evaluation:
        loss, _ = self._score(self.train, self._adapted)
        test_loss, accuracy = self._score(self.test, self._adapted)
        return {"loss": loss, "test_loss": test_loss, "accuracy": accuracy}

    def resolve(self) -> Evaluation:
        loss, _ = self._score(self.train, self._solved)
        test_loss, accuracy = self._score(self.test, self._solved)
        return {"resolved_loss": loss, "resolved_test_loss": test_loss, "resolved_accuracy": accuracy}

    @torch.no_grad()
    def _score(self, drawings: Tensor, heads_for: Callable[[Tensor], Tensor]) -> tuple[float, float]:
        """Upper loss and share of right answers on episodes that are the same at every evaluation."""
        generator, targets = torch.Generator().manual_seed(0), self.targets(self.queries)
        loss = right = 0.0
        for _ in range(EVALUATIONS):
            episodes = self.draw(drawings, self.episodes, generator)
            output = self.features(episodes.query) @ heads_for(self.features(episodes.support))
            loss += float((output - targets).square().sum(2).mean()) / 2
            right += float((output.argmax(2) == targets.argmax(1)).float().mean())
        return loss / EVALUATIONS, right / EVALUATIONS

    @torch.enable_grad()
    def _adapted(self, support: Tensor) -> Tensor:
        """As in training: so many lower steps from zero, by the task's own rule."""
        heads = torch.zeros_like(self.lower[0], requires_grad=True)
        rule: Any = self.lower_rule([heads])
        for _ in range(self.settings.lower_steps):
            rule.step(lambda: self._fit(support, heads))
        return heads.detach()

    def _solved(self, support: Tensor) -> Tensor:
        gram = support.mT @ support / support.shape[1] + self.ridge * torch.eye(support.shape[2])
        return torch.linalg.solve(gram, support.mT @ self.targets(self.shots) / support.shape[1])

    def lower_rule(self, params: list[Tensor]) -> torch.optim.Optimizer:
        return AutoSLS(params)


def create(
    seed: int,
    folder: str | Path | None = None,
    *,
    shots: int = 5,
    queries: int = 5,
    episodes: int = 4,
    **overrides: Any,
) -> FewShot:
    """5 characters an episode; the embedding is a small convolutional network."""
    train, test = data.characters(folder)
    ways = 5
    size = train.shape[-1] // 2 // 2
    network = nn.Sequential(
        nn.Unflatten(1, (1, train.shape[-1])),
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(16 * size * size, 64),
    )  # fmt: skip
    uniform_layers(network, torch.Generator().manual_seed(seed))
    settings = Settings(iterations=150, lower_steps=5, solver="cg", solver_steps=5)
    return FewShot(
        settings=replace(settings, **overrides),
        network=network,
        upper=list(network.parameters()),
        lower=[torch.zeros(episodes, 65, ways, requires_grad=True)],
        train=train,
        test=test,
        ways=ways,
        shots=shots,
        queries=queries,
        episodes=episodes,
    )
