"""The Trainer of transformers itself, where it is installed: `make test-hosts`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from adaptive_bilevel import AutoSLS, BiSLS, monitor
from adaptive_bilevel.errors import ClosureError
from adaptive_bilevel.hypergradient import implicit

transformers: Any = pytest.importorskip("transformers")
example: Any = pytest.importorskip("examples.data_mixing_trainer")
pytestmark = pytest.mark.filterwarnings("ignore")  # theirs
EXAMPLES, HELD_OUT = example.data(32)


@pytest.fixture(autouse=True)
def single_precision() -> None:
    torch.set_default_dtype(torch.float32)


def trainer(folder: Path, cls: Any = example.SourceWeights, **options: Any) -> Any:
    quiet = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "remove_unused_columns": False}
    plain = {"max_steps": 6, "per_device_train_batch_size": 24, "lr_scheduler_type": "constant", "save_strategy": "no"}
    arguments = transformers.TrainingArguments(str(folder), **{**quiet, **plain, **options})
    own = {"sources": 3, "held_out": HELD_OUT, "every": 2} if issubclass(cls, example.SourceWeights) else {}
    return cls(example.gpt2(dropout=0.0, attention="eager"), arguments, train_dataset=EXAMPLES, **own)


def reached(run: Any) -> list[Any]:
    return [run.weights.detach(), *(p.detach() for p in run.model.parameters())]


def trained(folder: Path, **options: Any) -> Any:
    run = trainer(folder, **options)
    run.train()
    return run


def test_it_goes_as_a_loop_of_ones_own(tmp_path: Path) -> None:
    batches: list[Any] = []

    class Listening(example.SourceWeights):
        def training_step(self, model: Any, inputs: Any, *rest: Any) -> Any:
            batches.append({name: tensor.clone() for name, tensor in inputs.items()})
            return super().training_step(model, inputs, *rest)

    run = trained(tmp_path, cls=Listening)
    other = trainer(tmp_path)
    inner: Any = other.create_optimizer()
    for k, batch in enumerate(batches):
        inner.step(lambda: other.compute_loss(other.model, batch))
        if k % 2:
            other.outer.step(lambda: other.compute_loss(other.model, HELD_OUT))
    assert all(map(torch.equal, reached(run), reached(other)))
    assert run.optimizer.optimizer.record == inner.record and run.outer.record == other.outer.record
    assert monitor(run.outer) == monitor(other.outer)


def test_it_learns_and_logs(tmp_path: Path) -> None:
    run = trained(tmp_path, max_steps=40, logging_steps=10, eval_strategy="no")
    logged = [row for row in run.state.log_history if "upper/loss" in row]
    assert logged[-1]["upper/loss"] < 0.9 * logged[0]["upper/loss"] and logged[0]["upper/step_size"] > 0
    assert run.weights.argmax() == 0
    assert run.evaluate([{k: v[0] for k, v in HELD_OUT.items()}])["eval_loss"] < 2.5


def test_accumulated_batches_are_one_batch(tmp_path: Path) -> None:
    one = trained(tmp_path)
    two = trained(tmp_path, per_device_train_batch_size=12, gradient_accumulation_steps=2)
    torch.testing.assert_close(one.weights, two.weights, rtol=1e-2, atol=1e-3)  # of float32
    assert float(one.loss) == pytest.approx(float(two.loss), rel=1e-3)
    assert one.state.global_step == two.state.global_step == 6
    assert one.inner.evaluations.lower.gradients == two.inner.evaluations.lower.gradients


def test_clipping_changes_nothing(tmp_path: Path) -> None:
    """The length of the gradient is not that of the step."""
    runs = [trained(tmp_path, max_grad_norm=norm) for norm in (0.0, 0.01)]
    assert all(map(torch.equal, *map(reached, runs)))


def test_schedules_are_factors(tmp_path: Path) -> None:
    constant = trained(tmp_path, max_steps=1)
    warm = trained(tmp_path, max_steps=1, lr_scheduler_type="linear", warmup_steps=2)
    assert warm.inner.record.step_size == 0.0 < constant.inner.record.step_size
    decayed = trained(tmp_path, lr_scheduler_type="linear")
    assert decayed.inner.param_groups[0]["lr"] == 0.0
    assert 0.0 < decayed.inner.record.step_size < trained(tmp_path).inner.record.step_size


def test_bfloat16(tmp_path: Path) -> None:
    run = trained(tmp_path, bf16=True, max_steps=40, logging_steps=10)
    logged = [row["upper/loss"] for row in run.state.log_history if "upper/loss" in row]
    assert logged[-1] < 0.9 * logged[0] and run.weights.argmax() == 0
    assert all(p.dtype is torch.float32 for p in reached(run))


def test_float16_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="fp16"):
        trainer(tmp_path, fp16=True)


def test_a_checkpoint_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(example, "PRODUCTS", "autograd")  # the lengths of differences are not saved
    expected = trained(tmp_path / "whole")
    options = {"save_strategy": "steps", "save_steps": 4}
    trained(tmp_path / "parts", **options)
    run = trainer(tmp_path / "parts", **options)
    run.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-4"))
    assert all(map(torch.equal, reached(run), reached(expected)))
    assert run.outer.record == expected.outer.record


def test_a_rule_in_a_stock_trainer_is_told_what_is_missing(tmp_path: Path) -> None:
    class Stock(transformers.Trainer):
        compute_loss = example.SourceWeights.compute_loss
        weights = torch.zeros(3)

    run = trainer(tmp_path, cls=Stock)
    run.optimizer = AutoSLS(run.model.parameters())
    before = [p.detach().clone() for p in run.model.parameters()]
    with pytest.raises(ClosureError, match=r"needs a closure(.|\n)*optimizer.host = self(.|\n)*def step"):
        run.train()
    assert all(map(torch.equal, run.model.parameters(), before))


@pytest.mark.parametrize("level", ["inner", "outer"])
def test_the_whole_training_step_as_a_closure_is_refused(level: str, tmp_path: Path) -> None:
    class Own(example.SourceWeights):
        def training_step(self, model: Any, inputs: Any, *rest: Any) -> Any:
            whole: Any = super().training_step
            self.inner.step(lambda: self.compute_loss(model, inputs))
            optimizer = self.optimizer if level == "inner" else self.accelerator.prepare(self.outer)
            return optimizer.step(lambda: whole(model, inputs, *rest))

    run = trainer(tmp_path, cls=Own)
    with pytest.raises(ClosureError, match=r"inside the closure(.|\n)*inner.step\(lower_loss\)(.|\n)*outer.step"):
        run.train()
    assert not run.weights.any() and isinstance(run.outer, BiSLS)


def test_the_lines_of_the_page_run(tmp_path: Path) -> None:
    page = Path(__file__).parents[2] / "docs" / "trainers.md"
    block = next(b for b in re.findall(r"```diff\n(.*?)```", page.read_text(), re.DOTALL) if "(Trainer)" in b)
    lines = [line[1:] for line in block.splitlines() if line[0] != "-"]
    names: dict[str, Any] = {"Trainer": transformers.Trainer, "AutoSLS": AutoSLS, "BiSLS": BiSLS, "implicit": implicit}
    exec("\n".join(lines[:-1]), names)

    two_levels: Any = names["TwoLevels"]

    class Whole(two_levels):
        compute_loss = example.SourceWeights.compute_loss
        weights, held_out = torch.zeros(3, requires_grad=True), HELD_OUT

    run = trainer(tmp_path, cls=Whole, max_steps=4)
    run.train()
    assert run.outer.record.moved and run.weights.argmax() == 0 and run.state.global_step == 4
