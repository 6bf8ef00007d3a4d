"""Stock gradient descent below: x does not outrun it."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from adaptive_bilevel_betty import BiSLS, bind
from tests.betty.problems import Level, Variable, engine, sgd


@pytest.mark.parametrize("direction", ["sgd", "adam"])
def test_x_does_not_outrun_a_slow_loop(direction: str) -> None:
    """Distillation of four images below a flat loss."""
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(4, 20, generator=generator, dtype=torch.float64)
    labels = torch.randint(4, (200,), generator=generator)
    images = means[labels] + torch.randn(200, 20, generator=generator, dtype=torch.float64)
    x, y = (Variable(torch.zeros(*shape, dtype=torch.float64)) for shape in ((4, 20), (20, 4)))
    top = Level(
        "outer",
        lambda problem, _: cross_entropy(images @ problem.inner.module(), labels),
        x,
        lambda params: BiSLS(params, direction=direction),
    )
    low = Level(
        "inner",
        lambda problem, _: (
            cross_entropy(problem.outer.module() @ problem.module(), torch.arange(4))
            + 0.5e-4 * problem.module().square().sum()
        ),
        y,
        sgd(0.1),
        type="adaptive_cg",
        unroll_steps=5,
    )
    bind(engine(low, top, steps=500)).run()
    assert top.losses[-1] < 0.003
