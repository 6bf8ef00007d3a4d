"""What steps do on an accelerator: tests marked device, the demo, host syncs, kernels, overhead beyond evaluations.

    python examples/benchmarks/device.py --output device.json     # under three minutes on a GPU

Without an accelerator it runs on the CPU, where tests are skipped and nothing is synchronised. Host syncs are
counted by torch.cuda.set_sync_debug_mode, kernels by torch's profiler, both as what the step adds to its
evaluations. A search may wait for the device once, and once for each trial; a Polyak rule with a known bound not at
all. Times are wall times between synchronisations, medians.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from adaptive_bilevel import SLS, SLSB, SPSB, BiSLS, BiSPS
from adaptive_bilevel.hypergradient import Lanczos, assign, implicit
from examples import hyper_representation
from overhead import MODELS

ROOT = Path(__file__).parents[2]
SLACK = 1  # of host syncs beside those of trials

Rule = Callable[[list[nn.Parameter]], torch.optim.Optimizer]

RULES: dict[str, Rule] = {
    "SPSB": lambda p: SPSB(p, lr=1e-4),
    "SPSB adam": lambda p: SPSB(p, lr=1e-5, direction="adam"),
    "SLSB": lambda p: SLSB(p, lr=1e-4),
    "SLS": lambda p: SLS(p, lr=1e-4, reset="initial"),
    "SLS adam": lambda p: SLS(p, lr=1e-5, reset="initial", direction="adam"),
}


class Operations(TorchDispatchMode):
    """Counts operations of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def seconds(call: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Return the median time of a call."""
    found = []
    for _ in range(repeats):
        wait(device)
        start = time.perf_counter()
        call()
        wait(device)
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def syncs(call: Callable[[], Any], device: torch.device) -> int | None:
    """Return how often a call waits for the device; None where torch cannot tell."""
    if device.type != "cuda":
        return None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(w.message) for w in caught)


def kernels(call: Callable[[], Any], device: torch.device) -> int | None:
    """Return the number of kernels that a call launches; None without CUDA."""
    if device.type != "cuda":
        return None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        wait(device)
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())


def operations(call: Callable[[], Any]) -> int:
    with Operations() as counted:
        call()
    return counted.count


def minus(all_of_it: int | None, part: int | None) -> int | None:
    return None if all_of_it is None or part is None else all_of_it - part


def one_level(name: str, model: str, device: torch.device, repeats: int) -> dict[str, Any]:
    """Return what a step of a rule takes beyond one gradient and its trials."""
    _, build, shape, classes, criterion = MODELS[model]
    torch.manual_seed(0)
    module, x = build().to(device), torch.randn(shape, device=device)
    out = module(x)
    target = torch.randint(classes, (shape[0],), device=device) if classes else torch.ones_like(out)
    params = list(module.parameters())
    optimizer: Any = RULES[name](params)

    def loss() -> Tensor:
        return criterion(module(x), target)

    def gradient() -> None:
        torch.autograd.grad(loss(), params)

    @torch.no_grad()
    def value() -> None:
        loss()

    def step() -> None:
        optimizer.step(loss)

    for warm in (gradient, value, step, step):
        warm()
    counted = {
        "host_syncs": minus(syncs(step, device), syncs(gradient, device)),
        "operations": operations(step) - operations(gradient),
        "kernels": minus(kernels(step, device), kernels(gradient, device)),
    }
    trials = int(optimizer.record.trials)
    whole, first, each = (seconds(call, device, repeats) for call in (step, gradient, value))
    cost = first + trials * each
    return {
        "rule": name,
        "model": MODELS[model][0],
        "trials": trials,
        **counted,
        "microseconds": round(1e6 * whole, 1),
        "of_its_evaluations": round(1e6 * cost, 1),
        "overhead": round((whole - cost) / cost, 3),
        "syncs_hold": None if counted["host_syncs"] is None else counted["host_syncs"] <= bar(name, trials),
    }


def bar(name: str, trials: int) -> int:
    return 0 if name.startswith("SPSB") else SLACK + trials


def two_levels(name: str, device: torch.device) -> dict[str, Any]:
    """Return the host syncs of an upper step of regularised regression, and how far ten iterations get."""
    generator = torch.Generator().manual_seed(0)
    a, b, c, d = (torch.randn(shape, generator=generator).to(device) for shape in ((64, 20), (64,), (64, 20), (64,)))
    x, y = torch.zeros(20, device=device, requires_grad=True), torch.zeros(20, device=device, requires_grad=True)

    def lower() -> Tensor:
        return (a @ y - b).square().mean() + (x.exp() * y.square()).sum() / 20

    def upper() -> Tensor:
        return (c @ y - d).square().mean()

    inner: Any = SPSB([y]) if name == "BiSPS" else SLS([y])
    outer: Any = BiSPS([x], lower=inner) if name == "BiSPS" else BiSLS([x], lower=inner, solver=Lanczos(5))
    losses, found = [], None
    for _ in range(10):
        for _ in range(3):
            inner.step(lower)
        assign([x], implicit(upper, lower, [x], [y], Lanczos(5)))
        found = syncs(lambda: outer.step(upper), device)
        if found is None:
            outer.step(upper)
        losses.append(upper().item())
    return {"rule": name, "host_syncs": found, "trials": int(outer.record.trials), "losses": losses}


def demo(device: torch.device, iterations: int) -> dict[str, Any]:
    """Return what BiSLS-Adam reaches in the demo, hyper-representation on digits."""
    data = hyper_representation.load(None)
    train, validation, test = (
        (images.to(device, torch.get_default_dtype()), labels.to(device))
        for images, labels in (data.train, data.validation, data.test)
    )
    moved = hyper_representation.Data(data.name, train, validation, test)
    start = time.perf_counter()
    with device:
        make_outer = hyper_representation.METHODS["BiSLS-Adam"]
        found = hyper_representation.train(make_outer, moved, iterations, 0, lambda *_: None)
    wait(device)
    return {
        "iterations": iterations,
        "validation_losses": [round(loss, 4) for loss in found.losses],
        "accuracy": round(found.accuracy, 4),
        "seconds": round(time.perf_counter() - start, 1),
    }


def tests() -> dict[str, int]:
    """Run the tests marked device."""
    files = [p for p in (ROOT / "tests").rglob("test_*.py") if "mark.device" in p.read_text()]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-m",
            "device",
            "-p",
            "no:cacheprovider",
            f"--junit-xml={report}",
        ]
        done = subprocess.run([*command, *map(str, files)], cwd=ROOT, capture_output=True, text=True)
        if not report.is_file():
            raise SystemExit(done.stdout + done.stderr)
        (suite,) = ElementTree.parse(report).getroot().iter("testsuite")
    if done.returncode:
        print(done.stdout[-4000:])
    return {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", help="cuda, mps, cpu, ...; default: the accelerator, if there is one")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--repeats", type=int, default=30, help="steps that are timed, per rule and model")
    parser.add_argument("--iterations", type=int, default=100, help="of the demo")
    parser.add_argument("--without-tests", action="store_true")
    parser.add_argument("--output", type=Path, help="JSON of what is found")
    args = parser.parse_args(argv)
    found = torch.accelerator.current_accelerator(check_available=True)
    device = torch.device(args.device) if args.device else found or torch.device("cpu")
    start = time.perf_counter()
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "tests": None if args.without_tests else tests(),
        "one_level": [one_level(name, model, device, args.repeats) for model in args.models for name in RULES],
        "two_levels": [two_levels(name, device) for name in ("BiSPS", "BiSLS")],
        "demo": demo(device, args.iterations),
    }
    result["seconds"] = round(time.perf_counter() - start, 1)
    print(f"{result['device']}, torch {result['torch']}; tests marked device: {result['tests']}")
    for row in result["one_level"]:
        print(
            f"{row['rule']:10} {row['model']:40} trials {row['trials']}, host syncs {row['host_syncs']}, operations "
            f"{row['operations']}, kernels {row['kernels']}, overhead {row['overhead']:.1%}"
        )
    for row in result["two_levels"]:
        print(
            f"{row['rule']:10} host syncs {row['host_syncs']}, loss {row['losses'][0]:.4f} to {row['losses'][-1]:.4f}"
        )
    shown = result["demo"]
    print(
        f"demo       {shown['iterations']} iterations in {shown['seconds']} s, validation loss "
        f"{shown['validation_losses'][-1]}, accuracy {shown['accuracy']:.1%}"
    )
    if args.output is not None:
        args.output.write_text(json.dumps(result, indent=1) + "\n")
    return result


if __name__ == "__main__":
    main()
