"""Accelerate itself, where it is installed: `make test-hosts`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from adaptive_bilevel import SLS, BiSLS, monitor
from adaptive_bilevel.hypergradient import implicit
from tests.hosts.problem import Problem, optimizers, plainly

accelerate: Any = pytest.importorskip("accelerate")
pytestmark = pytest.mark.filterwarnings("ignore")  # theirs


@pytest.fixture(autouse=True)
def first_accelerator() -> None:
    """All accelerators of a process share their state, and other tests have made some."""
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


@pytest.mark.parametrize("order", ["lower first", "together", "by two accelerators"])
def test_prepared_at_both_levels(order: str) -> None:
    expected, reference = plainly(4)
    accelerator, problem = accelerate.Accelerator(cpu=True), Problem()
    inner, outer = optimizers(problem)
    if order == "together":
        model, inner, outer = accelerator.prepare(problem.model, inner, outer)
    else:
        model, inner = accelerator.prepare(problem.model, SLS(problem.model.parameters()))
        upper = BiSLS([problem.decay], lower=inner, direction="adam", hypergradient=implicit)
        if order == "by two accelerators":  # they share their state; Accelerate itself refuses one of other settings
            accelerator = accelerate.Accelerator(cpu=True)
        outer = accelerator.prepare(upper)
    assert type(inner).__name__ == type(outer).__name__ == "AcceleratedOptimizer"
    problem.model = model
    for _ in range(4):
        for _ in range(5):
            inner.step(problem.lower)
        outer.step(problem.upper)
    assert torch.equal(problem.decay, expected.decay)
    assert monitor(outer) == monitor(reference)
    assert outer.optimizer.record == reference.record


def test_a_checkpoint_goes_on(tmp_path: Path) -> None:
    reached = []
    for stops in (False, True):
        accelerator, problem = accelerate.Accelerator(cpu=True), Problem()
        _model, inner, outer = accelerator.prepare(problem.model, *optimizers(problem))
        accelerator.register_for_checkpointing(problem)
        for k in range(4):
            if stops and k == 2:
                accelerator.save_state(str(tmp_path))
                problem.decay.data.zero_()
                accelerator.load_state(str(tmp_path))
            inner.step(problem.lower)
            outer.step(problem.upper)
        reached.append(problem.decay.detach())
    assert torch.equal(*reached)


def test_steps_within_an_accumulation_are_left_out() -> None:
    """As those of torch's optimizers are; the batches of an accumulation belong into one closure."""
    accelerator, problem = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2), Problem()
    model, inner, outer = accelerator.prepare(problem.model, *optimizers(problem))
    problem.model = model
    for _ in range(4):
        with accelerator.accumulate(model):
            inner.step(problem.lower)
            if accelerator.sync_gradients:
                outer.step(problem.upper)
    expected, reference = plainly(2, lower_steps=1)
    assert torch.equal(problem.decay, expected.decay) and monitor(outer) == monitor(reference)
