"""What a step costs beyond its evaluations, for four models, beside torch.optim.SGD and Adam.

    python examples/benchmarks/overhead.py
    python examples/benchmarks/overhead.py --peers DIR

DIR holds checkouts of the peers' repositories (sls, sps, ada_sls, PoNoS, MoMo); those that are there are in the run.
Overhead is the processor time of a step minus that inside its own closure, backward and zero_grad; the ratio is to what
the step's evaluations cost: one forward and backward, and one forward per trial. All steps are interleaved in random
order in one process, on one thread. Only figures of one run compare, since runs drift.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import os
import platform
import random
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor, nn

from adaptive_bilevel import SLS, SLSB, SPSB

RESULTS = Path(__file__).parent / "results" / "overhead.json"


class ManyTensors(nn.Module):
    """100 tensors of 1,000 numbers, each the weights of a logistic regression on the same data."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(0.01 * torch.randn(1000)) for _ in range(100)])

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([x @ w for w in self.weights], dim=1)


def lenet() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10)),
    )


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10))


def binary(out: Tensor, target: Tensor) -> Tensor:
    return nn.functional.binary_cross_entropy_with_logits(out, target)


MODELS: dict[str, tuple[str, Callable[[], nn.Module], tuple[int, ...], int, Any]] = {
    # name: what it is, model, input, classes (0: a sign per output), loss
    "a": ("logistic regression 300-1, batch 100", lambda: nn.Linear(300, 1), (100, 300), 0, binary),
    "b": ("LeNet-5 on 28x28, batch 128", lenet, (128, 1, 28, 28), 10, nn.functional.cross_entropy),
    "c": ("MLP 784-1024-1024-10, batch 128", mlp, (128, 784), 10, nn.functional.cross_entropy),
    "d": ("100 tensors of 1,000, batch 128", ManyTensors, (128, 1000), 0, binary),
}


class Clock:
    """Processor time inside evaluations: what `timed` is around, gradients and backwards; not twice where they nest."""

    def __init__(self) -> None:
        self.calls: list[float] = []
        self.depth = 0
        torch.autograd.grad = self.timed(torch.autograd.grad)
        torch.autograd.backward = self.timed(torch.autograd.backward)

    @property
    def inside(self) -> float:
        """Seconds since `calls` was emptied."""
        return sum(self.calls)

    def timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def measured(*args: Any, **kwargs: Any) -> Any:
            self.depth += 1
            start = time.thread_time()
            try:
                return call(*args, **kwargs)
            finally:
                self.depth -= 1
                if self.depth == 0:
                    self.calls.append(time.thread_time() - start)

        return measured


class Case:
    """One optimizer on one model."""

    def __init__(
        self, clock: Clock, model: str, make: Callable[[Any], Any], rejected: int | None, peer: Peer | None
    ) -> None:
        _, build, shape, classes, self.loss = MODELS[model]
        self.clock, self.rejected, self.forwards = clock, rejected, 0
        self.model = build()
        self.x = torch.randn(shape)
        out = self.model(self.x)
        self.target = torch.randint(classes, (shape[0],)) if classes else torch.bernoulli(torch.full_like(out, 0.5))
        self.optimizer = make(self.model.parameters())
        self.closure = clock.timed(self.differentiate if peer and peer.backward else self.evaluate)
        self.peer = peer

    def evaluate(self) -> Tensor:
        loss: Tensor = self.loss(self.model(self.x), self.target)
        if 0 < self.forwards <= (self.rejected or 0):
            loss = loss + torch.inf  # a trial to be rejected
        self.forwards += 1
        return loss

    def differentiate(self) -> Tensor:
        loss = self.evaluate()
        loss.backward()
        return loss

    def forward(self) -> float:
        """Return what a forward without gradients costs, in microseconds."""
        self.clock.calls, self.forwards = [], 0
        with torch.no_grad():
            self.closure()
        return 1e6 * self.clock.inside

    def step(self) -> float:
        """Take a step and return its overhead in microseconds; the clock has what its evaluations cost."""
        self.clock.calls, self.forwards = [], 0
        start = time.thread_time()
        if self.rejected is None:
            zeroing = time.thread_time()
            self.optimizer.zero_grad()
            zeroing = time.thread_time() - zeroing
            self.closure().backward()
            start += zeroing  # in neither
            self.optimizer.step()
        else:
            if self.peer:  # zero_grad is the caller's
                zeroing = time.thread_time()
                self.optimizer.zero_grad()
                start += time.thread_time() - zeroing
            self.optimizer.step(self.closure)
        return 1e6 * (time.thread_time() - start - self.clock.inside)


CASES: dict[str, tuple[Callable[[Any], Any], int | None, int]] = {
    # name: optimizer, rejected trials (None: a stock optimizer), forwards beside the first
    "SGD foreach": (lambda p: torch.optim.SGD(p, lr=1e-4, foreach=True), None, 0),
    "Adam foreach": (lambda p: torch.optim.Adam(p, lr=1e-5, foreach=True), None, 0),
    "SPSB": (lambda p: SPSB(p, lr=1e-4), 0, 0),
    "SLSB, 1 trial": (lambda p: SLSB(p, lr=1e-4), 0, 1),
    "SLS, 4 trials": (lambda p: SLS(p, lr=1e-4, reset="initial"), 3, 4),
    "SPSB adam": (lambda p: SPSB(p, lr=1e-5, direction="adam"), 0, 0),
    "SLS adam, 1 trial": (lambda p: SLS(p, lr=1e-5, reset="initial", direction="adam"), 0, 1),
    "SLS adam, 4 trials": (lambda p: SLS(p, lr=1e-5, reset="initial", direction="adam"), 3, 4),
}


class Peer(NamedTuple):
    """An optimizer from a checkout: repository, module, class, options, whether its closure calls backward."""

    repository: str
    module: str
    kind: str
    options: dict[str, float]
    backward: bool
    trials: int


PEERS = {
    "sps.Sps": Peer("sps", "sps", "Sps", {"init_step_size": 1e-4}, True, 0),
    "MoMo": Peer("MoMo", "momo", "Momo", {"lr": 1e-4}, True, 0),
    "sls.Sls, 1 trial": Peer("sls", "sls", "Sls", {"init_step_size": 1e-4}, False, 1),
    "PoNoS, 1 trial": Peer("PoNoS", "PoNoS", "PoNoS", {"max_eta": 1e-4}, False, 1),
    "AdaSLS, 1 trial": Peer("ada_sls", "adasls", "AdaSLS", {"init_step_size": 1e-5}, False, 1),
}


def add_peers(folder: Path) -> None:
    """Add the peers whose code is there, as they are."""
    for name, peer in PEERS.items():
        sys.path.insert(0, str(folder / peer.repository))
        try:
            made = getattr(importlib.import_module(peer.module), peer.kind)
        except ImportError as error:
            print(f"without {name}: {error}", file=sys.stderr)
        else:
            CASES[name] = (functools.partial(made, **peer.options), 0, peer.trials)
        sys.path.pop(0)


def measure(models: list[str], repeats: int) -> dict[str, Any]:
    torch.manual_seed(0)
    clock, table = Clock(), {}
    for model in models:
        cases = {name: Case(clock, model, make, no, PEERS.get(name)) for name, (make, no, _) in CASES.items()}
        order = [name for name in [*cases, "forward"] for _ in range(repeats)]
        random.Random(0).shuffle(order)
        for case in cases.values():  # state and workspaces are there from the second step on
            case.step()
        found: dict[str, list[float]] = {name: [] for name in order}
        both = []
        for name in order:
            if name == "forward":
                found[name].append(cases["SGD foreach"].forward())
                continue
            found[name].append(cases[name].step())
            if name == "SGD foreach":
                both.append(1e6 * clock.inside)
        gradient, value = statistics.median(both), statistics.median(found["forward"])
        rows = {}
        for name, (_, rejected, trials) in CASES.items():
            overhead, cost = statistics.median(found[name]), gradient + trials * value
            if rejected is not None and name not in PEERS:
                assert cases[name].optimizer.record.trials == trials, name
            rows[name] = {"overhead": round(overhead, 1), "ratio": round(overhead / cost, 4)}
            if name in PEERS:
                rows[name]["forwards"] = cases[name].forwards
        table[model] = {
            "model": MODELS[model][0],
            "forward and backward": round(gradient, 1),
            "forward": round(value, 1),
            "optimizers": rows,
        }
    return table


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--repeats", type=int, default=150, help="steps per optimizer and model")
    parser.add_argument("--peers", type=Path, help="folder of checkouts: sls, sps, ada_sls, PoNoS, MoMo")
    parser.add_argument("--save", action="store_true", help=f"write {RESULTS.name} beside the other results")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    if args.peers:
        add_peers(args.peers)
    table = measure(args.models, args.repeats)
    print(f"{'microseconds (ratio to its evaluations)':42}" + "".join(f"{m:>18}" for m in table))
    for name in CASES:
        cells = [table[m]["optimizers"][name] for m in table]
        print(f"{name:42}" + "".join(f"{c['overhead']:>10.0f} ({c['ratio']:.3f})" for c in cells))
    for kind in ("forward and backward", "forward"):
        print(f"{kind:42}" + "".join(f"{table[m][kind]:>10.0f}        " for m in table))
    result = {
        "command": shlex.join(
            ["python", "examples/benchmarks/overhead.py"]
            + ["DIR" if args.peers and a == str(args.peers) else a for a in (sys.argv[1:] if argv is None else argv)]
        ),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "unit": "microseconds of processor time, medians; ratio = overhead / evaluations",
        "models": table,
    }
    if args.save:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    return result


if __name__ == "__main__":
    main()
