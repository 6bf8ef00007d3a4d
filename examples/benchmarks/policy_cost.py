"""What a step of each policy costs, in microseconds, on Python floats and on scalars of NumPy, torch and JAX.

    python examples/benchmarks/policy_cost.py

Beside each rule stands the same rule written by hand with operators on floats alone, and for every kind of array the
part of the step that looks up the array namespace: once per type (what the package does), and with array-api-compat at
every call. The figures are processor times, the fastest of some repetitions, on one thread.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shlex
import sys
import time
import timeit
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ.setdefault("OMP_NUM_THREADS", "1")

import array_api_compat
import jax
import numpy as np
import torch

from adaptive_bilevel.policies import SLS, SLSB, SPSB, Constant, DecSPS, Envelope, GradientNorm, SPSMax, scalars

LOSS, SLOPE = 6.0, 20.0


def descend(step: float) -> float:
    return 0.0


POLICIES = {
    "Constant": Constant(bound=0.5),
    "SPSMax": SPSMax(bound=0.5),
    "DecSPS": DecSPS(bound=0.5),
    "SPSB": SPSB(bound=0.5),
    "Envelope": Envelope(bound=0.5, floor=0.01),
    "GradientNorm": GradientNorm(),
    "SLS": SLS(start=0.5, grow=1.0),
    "SLSB": SLSB(bound=0.5, grow=1.0),
}

KINDS: dict[str, Callable[[float], Any]] = {
    "float": float,
    "numpy scalar": np.float64,
    "numpy array": np.asarray,
    "torch": lambda number: torch.tensor(number, dtype=torch.float64),
    "jax": lambda number: jax.numpy.asarray(number),
}


# The rules by hand, with the same checks, on floats.


def by_hand(policy: Any) -> Callable[[float, float], float]:
    """Return (loss, slope) -> step of the rule, its state kept in a closure."""
    k, product, squares, previous = 0, 0.0, 1.0, 0.0
    given: Any = policy  # its options, all of which are numbers here

    def bounded(loss: float, slope: float) -> float:
        nonlocal k, product, squares, previous
        if not (math.isfinite(loss) and math.isfinite(slope)) or slope <= 0.0:
            return 0.0
        if isinstance(policy, GradientNorm):
            squares += slope
            return squares**-0.5
        if isinstance(policy, SLS | SLSB):
            cap = loss / (given.c * slope)
            if isinstance(policy, SLSB):
                cap = min(cap, given.bound / math.sqrt(k + 1))
            step = min(given.grow * previous if previous else 0.5, cap)
            threshold = loss + 2.2e-16 * abs(loss)
            while not descend(step) <= threshold - given.c * step * slope:
                step *= given.shrink
            k, previous = k + 1, step
            return step
        if isinstance(policy, Constant):
            step = given.bound
        elif isinstance(policy, DecSPS):
            c = given.c * math.sqrt(k + 1)
            step = min(max(loss, 0.0) / slope, product or given.c * given.bound) / c
            product = c * step
        else:
            high = given.bound / math.sqrt(k + 1) if given.decay == "inverse_sqrt" else given.bound
            step = min(max(max(loss, 0.0) / (given.c * slope), min(given.floor, high)), high)
        k += 1
        return step

    return bounded


def cost(call: Callable[[], Any], seconds: float) -> float:
    """Return microseconds of processor time per call, the fastest of 40 short repetitions."""
    timer = timeit.Timer(call, timer=time.process_time)
    timer.timeit(20)
    number = max(1, int(50 * seconds / 40 / timer.timeit(50)))
    return 1e6 * min(timer.repeat(40, number)) / number


def stepper(policy: Any, kind: Callable[[float], Any]) -> Callable[[], Any]:
    """Return a call that takes a step from a state in the middle of a run."""
    loss, slope = kind(LOSS), kind(SLOPE)
    _, state = policy.step(policy.init(), loss=loss, slope=slope, trial=descend)

    def step() -> Any:
        record, _ = policy.step(state, loss=loss, slope=slope, trial=descend)
        return jax.block_until_ready(record.step_size)

    return step


@contextmanager
def namespace(found: Callable[[Any], Any]) -> Iterator[None]:
    """Look array namespaces up in another way for a while."""
    with patch.object(scalars, "array_namespace", found):
        yield


def measure(seconds: float) -> dict[str, Any]:
    steps: dict[str, dict[str, float]] = {}
    for name, policy in POLICIES.items():
        hand = by_hand(policy)
        row = {"by hand": cost(lambda: hand(LOSS, SLOPE), seconds)}
        for kind, convert in KINDS.items():
            row[kind] = cost(stepper(policy, convert), seconds)
        steps[name] = row
        print(f"{name:<14}" + "".join(f"{value:>14.1f}" for value in row.values()), flush=True)
    lookups: dict[str, dict[str, float]] = {}
    for kind, convert in KINDS.items():
        if kind == "float":
            continue
        step = stepper(POLICIES["SPSB"], convert)
        known = scalars.array_namespace(convert(LOSS))
        with namespace(lambda array: known):
            none = cost(step, seconds)
        with namespace(array_api_compat.array_namespace):
            every = cost(step, seconds)
        lookups[kind] = {"none": none, "once per type": cost(step, seconds), "array-api-compat at every call": every}
    return {"microseconds per step": steps, "SPSB by namespace lookup": lookups}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(__file__).parent / "results" / "policy_cost.json"
    parser.add_argument("--output", type=Path, default=default, help="JSON file of the results")
    parser.add_argument("--seconds", type=float, default=0.3, help="time spent on each figure")
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    jax.config.update("jax_enable_x64", True)
    print("microseconds per step\n" + " " * 14 + "".join(f"{kind:>14}" for kind in ("by hand", *KINDS)))
    results = measure(arguments.seconds)
    print("\nSPSB by how the array namespace is found")
    for kind, row in results["SPSB by namespace lookup"].items():
        print(f"{kind:<14}" + ", ".join(f"{how}: {value:.1f}" for how, value in row.items()))

    packages = ("torch", "jax", "numpy", "array-api-compat")
    content = {
        "command": shlex.join(["python", "examples/benchmarks/policy_cost.py", *sys.argv[1:]]),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        **results,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    rounded = json.loads(json.dumps(content), parse_float=lambda text: round(float(text), 2))
    arguments.output.write_text(json.dumps(rounded, indent=1) + "\n")


if __name__ == "__main__":
    main()
