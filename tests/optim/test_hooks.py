"""Hooks of torch: those around a step, those of all optimizers, those of a gradient, and the profiler."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from tests.optim.helpers import OptimizerInfo, every_class, leaf, quadratic


@every_class
def test_step_hooks_run(info: OptimizerInfo) -> None:
    x = leaf()
    optimizer = info.make([x])
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    optimizer.step(lambda: quadratic(x))
    assert seen == ["before", "after"]


@every_class
def test_global_step_hooks_and_profilers_see_the_step(info: OptimizerInfo) -> None:
    x = nn.Parameter(torch.tensor([3.0, 2.0]))
    optimizer, seen = info.make([x]), []
    handles = [
        register_optimizer_step_pre_hook(lambda *_: seen.append("before")),
        register_optimizer_step_post_hook(lambda *_: seen.append("after")),
    ]
    try:
        optimizer.step(lambda: (x**2).sum())
    finally:
        for handle in handles:
            handle.remove()
    assert seen == ["before", "after"]
    with torch.autograd.profiler.profile() as profile:
        optimizer.step(lambda: (x**2).sum())
    assert any(event.name == f"Optimizer.step#{info.cls.__name__}.step" for event in profile.function_events or [])
    assert seen == ["before", "after"]


@every_class
def test_gradient_hooks_run_once_per_evaluation(info: OptimizerInfo) -> None:
    x = leaf()
    seen = []
    x.register_hook(lambda g: seen.append("tensor"))
    x.register_post_accumulate_grad_hook(lambda p: seen.append("accumulated"))
    info.make([x], 1e-3).step(lambda: quadratic(x))
    assert seen == ["tensor", "accumulated"]
