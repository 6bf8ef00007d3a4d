"""Language models of 1e6 to 1e8 parameters as the lower level, and products by differences beside double backward.

    python examples/benchmarks/at_size.py [--sizes 1e6 1e7 1e8] [--variants ...] [--output at_size.json]

Every figure comes from a process of its own, with one thread. "peak" is the most that all tensors beyond data and
parameters held, in copies of y (see `live`); "seconds" and "cost" (in gradients: a product with the lower Hessian
counts 2.2, one with mixed derivatives 1, a value .35) are those of the last upper iteration.

The first table: the weights of five data sources above a GPT, three lower steps, `Lanczos(10)`. "constant" is Adam at
both levels with the hypergradient of `implicit`; "BiSLS" has `SLS` below and `BiSLS` above, along Adam's directions,
with no number. Products by autograd need the attention of mathematical operations; differences use the fused one.

The second: weights of samples above LeNet-5, a perceptron and a small GPT, `BiSLS` with products of both kinds, ten
upper iterations.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from adaptive_bilevel import SLS, BiSLS
from adaptive_bilevel.evaluation.counts import Counts
from adaptive_bilevel.hypergradient import Lanczos, assign, implicit_with_info
from examples.data_mixing_distributed import GPT, Config
from live import live_bytes
from methods import plain_step
from tasks.base import lenet

CONFIGS = {
    1e6: Config(vocabulary=256, context=32, layers=4, heads=4, width=144),
    1e7: Config(vocabulary=256, context=32, layers=6, heads=8, width=368),
    1e8: Config(vocabulary=256, context=32, layers=12, heads=12, width=828),
}
LARGE_BLOCKS = {"MALLOC_MMAP_THRESHOLD_": "262144"}
"""glibc keeps released blocks below 32 MiB in a heap that tensors of many sizes tear apart; not with this."""
SOURCES, LOWER_STEPS, SAMPLES = 5, 3, 64
PENALTY = 1e-3
VARIANTS = {
    "constant, autograd": ("constant", "autograd", None),
    "BiSLS, autograd": ("BiSLS", "autograd", None),
    "constant, differences": ("constant", "difference", None),
    "BiSLS, differences": ("BiSLS", "difference", None),
    "BiSLS, differences, bf16": ("BiSLS", "difference", "bfloat16"),
}
Loss = Callable[[], Tensor]


class Problem:
    """Weights x above a network y: the lower loss is a weighted sum of losses, the upper one a mean of others."""

    def __init__(self, model: nn.Module, losses: Callable[[int], Tensor], weights: int) -> None:
        self.x, self.y = [torch.zeros(weights, requires_grad=True)], list(model.parameters())
        self._losses = losses

    def lower(self) -> Tensor:
        losses = self._losses(0)
        weights = self.x[0].softmax(0)
        penalty = torch.stack([p.square().sum() for p in self.y]).sum()
        return losses.view(len(weights), -1).mean(1) @ weights + PENALTY * penalty

    def upper(self) -> Tensor:
        return self._losses(1).mean()


def language(config: Config) -> Problem:
    model = GPT(config)
    shape = (SOURCES, config.context + 1)  # a sequence of each
    tokens = [torch.randint(config.vocabulary, shape) for _ in range(2)]
    return Problem(model, lambda part: model(tokens[part]), SOURCES)


def images(model: nn.Module, *shape: int) -> Problem:
    inputs = torch.randn(2, SAMPLES, *shape)
    labels = (inputs.flatten(2) @ torch.randn(inputs[0, 0].numel(), 10)).argmax(2)

    def losses(part: int) -> Tensor:
        return nn.functional.cross_entropy(model(inputs[part]), labels[part], reduction="none")

    return Problem(model, losses, SAMPLES)


NETWORKS: dict[str, Callable[[], Problem]] = {
    "LeNet-5, 28x28, batch 64": lambda: images(lenet(10), 28, 28),
    "MLP 784-256-128-10, batch 64": lambda: images(
        nn.Sequential(nn.Linear(784, 256), nn.Tanh(), nn.Linear(256, 128), nn.Tanh(), nn.Linear(128, 10)), 784
    ),
    "GPT, 2 layers of width 64": lambda: language(Config(vocabulary=64, width=64)),
}


def iteration(problem: Problem, rule: str, products: str, dtype: str | None) -> tuple[Callable[[], None], Any]:
    """An upper iteration, and what all of them have cost in gradients so far."""
    x, y, counts = problem.x, problem.y, Counts()
    solver = Lanczos(10, dtype=None if dtype is None else getattr(torch, dtype))
    constant = rule == "constant"
    inner: Any = torch.optim.Adam(y, lr=1e-3) if constant else SLS(y, direction="adam")
    outer: Any = torch.optim.Adam(x, lr=1e-2) if constant else None
    if outer is None:
        outer = BiSLS(x, lower=inner, direction="adam", solver=solver, products=products)
    lower_step = plain_step(inner, y)

    def iterate() -> None:
        for _ in range(LOWER_STEPS):
            lower_step(problem.lower)
        h, info = implicit_with_info(problem.upper, problem.lower, x, y, solver, products=products)
        assign(x, h)
        counts.gradients += info.gradients + LOWER_STEPS * constant
        counts.hvps, counts.jvps = counts.hvps + info.hvps, counts.jvps + info.jvps
        del h, info  # a loop that calls implicit holds neither
        outer.step() if constant else outer.step(problem.upper)

    def cost() -> float:
        own = [] if constant else [inner.evaluations.lower, outer.evaluations.upper, outer.evaluations.lower]
        return counts.cost + sum(level.cost for level in own)

    return iterate, cost


def measure(make: Callable[[], Problem], rule: str, products: str, dtype: str | None, times: int) -> dict[str, float]:
    """Seconds and cost of the last iteration, the cost of all, and the peak."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    problem = make()
    iterate, cost = iteration(problem, rule, products, dtype)
    seconds, costs = [], [cost()]

    def run() -> None:
        for _ in range(times):
            start = time.process_time()
            iterate()
            seconds.append(time.process_time() - start)
            costs.append(cost())

    kinds = [SDPBackend.MATH] if products == "autograd" else [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel(kinds):
        peak = max(live_bytes(run))
    size = sum(p.numel() for p in problem.y)
    return {
        "parameters": size,
        "seconds": seconds[-1],
        "cost": costs[-1] - costs[-2],
        "total_cost": costs[-1],
        "peak": peak / (4.0 * size),
        "resident_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
        "upper_loss": float(problem.upper().detach()),
    }


def child(**job: Any) -> dict[str, Any]:
    command = [sys.executable, __file__, "--child", json.dumps(job)]
    own = LARGE_BLOCKS if job.get("size", 0.0) >= 1e8 else {}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, **own})
    found: dict[str, Any] = json.loads(done.stdout)
    told = ", ".join(f"{name} {value:,.4g}" for name, value in found.items())
    print(f"{', '.join(str(value) for value in job.values())}: {told}", flush=True)
    return found


def of_child(job: dict[str, Any]) -> dict[str, float]:
    if "size" in job:
        return measure(lambda: language(CONFIGS[job["size"]]), *VARIANTS[job["variant"]], times=2)
    return measure(NETWORKS[job["network"]], "BiSLS", job["products"], None, times=10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=float, nargs="*", default=list(CONFIGS), choices=list(CONFIGS))
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--output", type=Path, default=Path("at_size.json"), help="what it holds already stays")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(of_child(json.loads(arguments.child))))
        return
    known = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
    content = {
        "commands": [*known.get("commands", []), shlex.join(["python", *sys.argv])],
        "torch": torch.__version__,
        "products": known.get("products") or products(),
        "sizes": known.get("sizes", {}),
    }

    def save() -> None:
        arguments.output.write_text(json.dumps(content, indent=1) + "\n")

    save()
    for size in arguments.sizes:
        own = content["sizes"].setdefault(f"{size:.0e}", {})
        own.update({name: child(size=size, variant=name) for name in arguments.variants})
        save()


def products() -> dict[str, dict[str, Any]]:
    kinds = ("autograd", "difference")
    return {name: {kind: child(network=name, products=kind) for kind in kinds} for name in NETWORKS}


if __name__ == "__main__":
    main()
