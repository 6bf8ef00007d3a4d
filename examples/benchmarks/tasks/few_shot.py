"""Few-shot learning: the upper level learns an embedding, the lower level fits a linear head for each episode.

lower  g(x, y) = sum over episodes of 1/(2n) sum ||y_e' phi_x(a) - onehot||^2 + lambda/2 ||y_e||^2    on the support
upper  f(x, y) = mean over episodes of the same without lambda                                       on the queries

An episode is a draw of `ways` characters with `shots` drawings each for the support; an upper iteration takes several,
all new, so that its lower variables start at zero again.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import data
from adaptive_bilevel import SLS

from .base import Evaluation, Settings, uniform_layers

EVALUATED = 40  # episodes


class Episodes(NamedTuple):
    """Drawings, (episodes, ways * drawings, height, width); the labels are the same in all episodes."""

    support: Tensor
    query: Tensor


@dataclass
class FewShot:
    """`upper` is the embedding; `lower` is episodes x (features + 1) x ways, at zero when an iteration begins.

    "loss" is the upper loss on held-out episodes of test characters with the heads solved for.
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
        each = self.shots + self.queries
        chosen = [
            drawings[torch.randperm(len(drawings), generator=generator)[: self.ways]][
                :, torch.randperm(drawings.shape[1], generator=generator)[:each]
            ]
            for _ in range(count)
        ]
        content = torch.stack(chosen)  # episodes, ways, drawings, height, width
        return Episodes(content[:, :, : self.shots].flatten(1, 2), content[:, :, self.shots :].flatten(1, 2))

    def features(self, drawings: Tensor) -> Tensor:
        embedded = self.network(drawings.flatten(0, 1)).unflatten(0, drawings.shape[:2])
        return torch.cat([embedded, embedded.new_ones(*embedded.shape[:2], 1)], dim=2)

    def targets(self, each: int) -> Tensor:
        return torch.eye(self.ways, dtype=self.lower[0].dtype).repeat_interleave(each, dim=0)

    def upper_loss(self, batch: Episodes) -> Tensor:
        errors = self.features(batch.query) @ self.lower[0] - self.targets(self.queries)
        return errors.square().sum(2).mean() / 2

    def lower_loss(self, batch: Episodes) -> Tensor:
        errors = self.features(batch.support) @ self.lower[0] - self.targets(self.shots)
        fit = errors.square().sum(2).mean(1).sum() / 2
        return fit + self.ridge / 2 * self.lower[0].square().sum()

    @torch.no_grad()
    def sample_lower(self, generator: torch.Generator) -> Episodes:
        self.now = self.draw(self.train, self.episodes, generator)
        self.lower[0].zero_()
        return self.now

    def sample_upper(self, generator: torch.Generator) -> Episodes:
        assert self.now is not None
        return self.now  # the queries belong to the episodes of the lower level

    @torch.no_grad()
    def evaluate(self) -> Evaluation:
        episodes = self.draw(self.test, EVALUATED, torch.Generator().manual_seed(0))
        support, query = self.features(episodes.support), self.features(episodes.query)
        gram = support.mT @ support / support.shape[1] + self.ridge * torch.eye(support.shape[2])
        heads = torch.linalg.solve(gram, support.mT @ self.targets(self.shots) / support.shape[1])
        output, targets = query @ heads, self.targets(self.queries)
        right = output.argmax(2) == targets.argmax(1)
        loss = (output - targets).square().sum(2).mean() / 2
        return {"loss": float(loss), "accuracy": float(right.float().mean())}

    def resolve(self) -> Evaluation:
        return {}  # evaluations solve for the heads already

    def lower_rule(self, params: list[Tensor]) -> torch.optim.Optimizer:
        return SLS(params)


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
