"""Weights of data sources for a language model, in one process or in several, with no step size given at either level.

Upper level: one weight for each of five data sources, judged by the loss on held-out text. Lower level: a GPT with
fused attention, trained on the weighted sum of the sources' losses. Two sources are of the held-out language, one
of them with few sequences; two are of other languages, and one is noise. Each process has batches of its own; the
losses of both levels are means over the processes. Products with the lower Hessian are differences of gradients,
since fused attention has no second derivative.

    python examples/data_mixing_distributed.py
    torchrun --nproc-per-node 2 examples/data_mixing_distributed.py
    torchrun --nproc-per-node 2 examples/data_mixing_distributed.py --compare   # beside six constant upper rates
"""

from __future__ import annotations

import argparse
import json
import os
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn

from adaptive_bilevel import SLS, BiSLS
from adaptive_bilevel.hypergradient import Lanczos, assign, implicit

SOURCES = ("held-out language", "the same, few", "another language", "a third one", "noise")
FEW, MANY, HELD_OUT = 16, 512, 256
RATES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
SOLVER = Lanczos(5)


@dataclass(frozen=True)
class Config:
    """A GPT."""

    vocabulary: int = 32
    context: int = 24
    layers: int = 2
    heads: int = 2
    width: int = 32


class Block(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        width = config.width
        self.heads = config.heads
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attend, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.feed = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, h: Tensor) -> Tensor:
        batch, length, width = h.shape
        q, k, v = self.attend(self.before(h)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        h = h + self.out(attended.transpose(1, 2).reshape(batch, length, width))
        return h + self.feed(self.between(h))


class GPT(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.tokens = nn.Embedding(config.vocabulary, config.width)
        self.places = nn.Parameter(0.02 * torch.randn(config.context, config.width))
        self.blocks = nn.Sequential(*(Block(config) for _ in range(config.layers)))
        self.end = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the loss of each sequence."""
        logits = self.head(self.end(self.blocks(self.tokens(tokens[:, :-1]) + self.places)))
        losses = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
        return losses.view(len(tokens), -1).mean(1)


def text(config: Config, language: int | None, sequences: int, seed: int) -> Tensor:
    """Return sequences of a language, a Markov chain whose next token depends on two; None: of noise."""
    n, generator = config.vocabulary, torch.Generator().manual_seed(seed)
    if language is None:
        return torch.randint(n, (sequences, config.context + 1), generator=generator)
    rule = torch.Generator().manual_seed(1000 + language)
    chances = torch.distributions.utils.logits_to_probs(2.5 * torch.randn(n, n, generator=rule))
    shift = int(torch.randint(1, n, (1,), generator=rule))
    written = [torch.randint(n, (sequences,), generator=generator) for _ in range(2)]
    while len(written) <= config.context:
        state = (written[-1] + (written[-2] % 2) * shift) % n
        written.append(torch.multinomial(chances[state], 1, generator=generator).squeeze(1))
    return torch.stack(written, 1)


class Mixing:
    """Model, weights and data of this process."""

    def __init__(self, rank: int, batch: int, config: Config) -> None:
        torch.manual_seed(0)
        self.model = GPT(config)
        self.logits = torch.zeros(len(SOURCES), requires_grad=True)
        kinds = ((0, MANY), (0, FEW), (1, MANY), (2, MANY), (None, MANY))
        self.train = [text(config, language, size, seed) for seed, (language, size) in enumerate(kinds)]
        self.held_out, self.test = (text(config, 0, HELD_OUT, seed) for seed in (10, 11))
        self.batch, self.generator = batch, torch.Generator().manual_seed(100 + rank)

    def drawn(self, source: Tensor) -> Tensor:
        return source[torch.randint(len(source), (self.batch,), generator=self.generator)]

    def lower(self) -> Callable[[], Tensor]:
        """Return the loss of the next batch: the weighted sum of the sources' losses."""
        tokens = torch.cat([self.drawn(source) for source in self.train])
        return lambda: self.model(tokens).view(len(SOURCES), -1).mean(1) @ self.logits.softmax(0)

    def upper(self) -> Callable[[], Tensor]:
        tokens = self.drawn(self.held_out)
        return lambda: self.model(tokens).mean()

    @torch.no_grad()
    def tested(self) -> float:
        return float(self.model(self.test).mean())


def train(rate: float | None, rank: int, args: argparse.Namespace) -> dict[str, Any]:
    """Return what a run leaves; rate: of Adam at the upper level, None: of BiSLS, which needs none."""
    task = Mixing(rank, args.batch, Config())
    x, y = [task.logits], list(task.model.parameters())
    inner = SLS(y, direction="adam")
    outer: Any
    if rate is None:
        outer = BiSLS(x, lower=inner, direction="adam", solver=SOLVER, products="difference")
    else:
        outer = torch.optim.Adam(x, lr=rate)
    start = time.perf_counter()
    for _ in range(args.iterations):
        for _ in range(args.lower_steps):
            loss = task.lower()
            inner.step(loss)
        upper = task.upper()
        assign(x, implicit(upper, loss, x, y, SOLVER, products="difference"))
        outer.step(upper) if rate is None else outer.step()
    return {
        "method": "BiSLS-Adam, no number" if rate is None else f"Adam, lr {rate:g}",
        "held_out_loss": task.tested(),
        "weights": [round(w, 3) for w in task.logits.detach().softmax(0).tolist()],
        "seconds": round(time.perf_counter() - start, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=40)
    parser.add_argument("--lower-steps", type=int, default=3)
    parser.add_argument("--batch", type=int, default=8, help="sequences of each source and process")
    parser.add_argument("--compare", action="store_true", help="run six constant upper rates, too")
    parser.add_argument("--output", type=Path, help="JSON of all runs")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("once")
    several = "RANK" in os.environ  # torchrun's
    if several:
        distributed.init_process_group("gloo")
    rank = distributed.get_rank() if several else 0
    runs = []
    for rate in (None, *(RATES if args.compare else ())):
        runs.append(train(rate, rank, args))
        if rank == 0:
            found = runs[-1]
            weights = ", ".join(f"{name} {w:.2f}" for name, w in zip(SOURCES, found["weights"], strict=True))
            print(f"{found['method']}: held-out loss {found['held_out_loss']:.4f} ({found['seconds']} s)\n  {weights}")
    if rank == 0 and args.compare:
        best = min(found["held_out_loss"] for found in runs[1:])
        print(f"against the best of {len(RATES)} rates: {runs[0]['held_out_loss'] / best:.3f}")
    if rank == 0 and args.output is not None:
        args.output.write_text(json.dumps({"processes": distributed.get_world_size() if several else 1, "runs": runs}))
    if several:
        distributed.destroy_process_group()


if __name__ == "__main__":
    main()
