"""A run that is killed (signal 9) goes on from its last checkpoint, bitwise."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = """
import os, signal, sys, torch
from adaptive_bilevel import *
from adaptive_bilevel.hypergradient import assign, implicit
path, upper_class, lower_class, die = sys.argv[1], globals()[sys.argv[2]], globals()[sys.argv[3]], int(sys.argv[4])
torch.set_num_threads(1)
torch.manual_seed(0)
A, t = torch.randn(20, 4), torch.randn(20)
x, y = torch.zeros(4, requires_grad=True), torch.zeros(4, requires_grad=True)
inner = lower_class([y])
outer = upper_class([x], lower=inner)
first = 0
if os.path.exists(path):
    s = torch.load(path, weights_only=True)
    inner.load_state_dict(s["inner"]); outer.load_state_dict(s["outer"]); torch.set_rng_state(s["rng"]); first = s["k"]
    with torch.no_grad(): x.copy_(s["x"]); y.copy_(s["y"])
for k in range(first, 9):
    for j in range(3):
        b = torch.randint(20, (8,))
        g = lambda b=b: ((A[b] @ y - t[b]) ** 2).mean() + (x.exp() * y**2).sum()
        inner.step(g)
        if (k, j) == (die, 1): os.kill(os.getpid(), signal.SIGKILL)
    f = lambda: ((A @ y - t - 0.1) ** 2).mean()
    assign([x], implicit(f, g, [x], [y]))
    outer.step(f)
    state = {"inner": inner.state_dict(), "outer": outer.state_dict(), "rng": torch.get_rng_state(), "k": k + 1}
    torch.save({**state, "x": x.detach(), "y": y.detach()}, path + ".new"); os.replace(path + ".new", path)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no such signal")
@pytest.mark.parametrize(
    ("upper", "lower"), [("BiSLS", "AutoSLS"), pytest.param("BiSPS", "SPSB", marks=pytest.mark.slow)]
)
def test_a_killed_run_goes_on_bitwise(tmp_path: Path, upper: str, lower: str) -> None:
    def run(name: str, die: int) -> int:
        command = [sys.executable, "-c", SCRIPT, str(tmp_path / name), upper, lower, str(die)]
        return subprocess.run(command, env=dict(os.environ), check=False).returncode

    assert run("whole", -1) == 0
    assert run("killed", 4) == -signal.SIGKILL
    assert run("killed", -1) == 0
    whole, killed = (torch.load(tmp_path / name, weights_only=True) for name in ("whole", "killed"))
    assert whole["k"] == killed["k"] == 9
    assert torch.equal(whole["x"], killed["x"]) and torch.equal(whole["y"], killed["y"])
