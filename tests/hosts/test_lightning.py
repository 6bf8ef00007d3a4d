"""Lightning itself, where it is installed: `make test-hosts`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from adaptive_bilevel import SLS, monitor
from adaptive_bilevel.errors import ClosureError
from tests.hosts.problem import Problem, optimizers, plainly

lightning: Any = pytest.importorskip("pytorch_lightning")
pytestmark = pytest.mark.filterwarnings("ignore")  # theirs


def two_levels() -> Any:
    """Return a module with manual optimization."""
    base: Any = lightning.LightningModule

    class TwoLevels(base, Problem):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.rows: list[Any] = []

        def configure_optimizers(self) -> Any:
            return optimizers(self)

        def training_step(self, batch: Any, index: int) -> None:
            inner, outer = self.optimizers()  # type: ignore[operator]
            for _ in range(5):
                inner.step(self.lower)
            outer.step(self.upper)
            self.log_dict(monitor(outer, words=False))  # type: ignore[operator]
            self.rows.append(monitor(outer))

    return TwoLevels()


def lower_only() -> Any:
    """Return a module whose one optimizer Lightning steps itself."""
    base: Any = lightning.LightningModule

    class LowerOnly(base, Problem):
        def configure_optimizers(self) -> Any:
            return SLS(self.model.parameters())

        def training_step(self, batch: Any, index: int) -> Any:
            return self.lower()

    return LowerOnly()


def trainer(folder: Path, **options: Any) -> Any:
    quiet = {"max_epochs": 1, "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return lightning.Trainer(accelerator="cpu", default_root_dir=folder, **{**quiet, **options})


def loader(steps: int) -> Any:
    return torch.utils.data.DataLoader([0.0] * steps, batch_size=1)  # type: ignore[arg-type]


def test_two_levels_by_manual_optimization(tmp_path: Path) -> None:
    expected, reference = plainly(4)
    module, fit = two_levels(), trainer(tmp_path, enable_checkpointing=False)
    fit.fit(module, loader(4))
    assert torch.equal(module.decay, expected.decay)
    assert module.rows[-1] == monitor(reference)
    assert float(fit.callback_metrics["upper/loss"]) == pytest.approx(module.rows[-1]["upper/loss"], rel=1e-6)
    assert fit.global_step == 4 * 6  # Lightning counts the steps of all optimizers


def test_a_checkpoint_goes_on(tmp_path: Path) -> None:
    expected, _ = plainly(4)
    first = two_levels()
    fit = trainer(tmp_path, enable_checkpointing=False, limit_train_batches=2)
    fit.fit(first, loader(4))
    fit.save_checkpoint(tmp_path / "run.ckpt")
    module = two_levels()
    trainer(tmp_path, enable_checkpointing=False, max_epochs=2, limit_train_batches=2).fit(
        module, loader(4), ckpt_path=tmp_path / "run.ckpt", weights_only=True
    )
    assert torch.equal(module.decay, expected.decay)


@pytest.mark.parametrize("clip", [None, 0.1])
def test_the_lower_rules_by_automatic_optimization(clip: float | None, tmp_path: Path) -> None:
    module, fit = lower_only(), trainer(tmp_path, enable_checkpointing=False, gradient_clip_val=clip)
    fit.fit(module, loader(6))
    problem = Problem()
    inner = SLS(problem.model.parameters())

    def closure() -> Any:
        loss = problem.lower()
        if clip is not None:
            inner.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(problem.model.parameters(), clip)
        return loss

    for _ in range(6):
        inner.step(closure)
    torch.testing.assert_close(module.model.weight, problem.model.weight, rtol=1e-9, atol=1e-9)
    assert fit.global_step == 6 and fit.optimizers[0].record.trials == inner.record.trials  # type: ignore[union-attr]


def test_an_upper_optimizer_by_automatic_optimization_is_refused(tmp_path: Path) -> None:
    base: Any = lightning.LightningModule

    class Automatic(base, Problem):
        def configure_optimizers(self) -> Any:
            self.inner, outer = optimizers(self)
            self.inner.step(self.lower)
            return outer

        def training_step(self, batch: Any, index: int) -> Any:
            self.inner.step(self.lower)
            return self.upper()

    with pytest.raises(ClosureError, match="automatic_optimization = False"):
        trainer(tmp_path, enable_checkpointing=False).fit(Automatic(), loader(2))
