"""Weights of data sources in the Trainer of transformers, with no step size given at either level.

Upper level: one weight for each of three data sources, judged by the loss on held-out text. Lower level: a GPT-2, built
from a configuration, trained on the weighted loss of the sources. The first source is of the held-out language, the
second of another one, and the third is noise. `SourceWeights` is the part to copy.

    python examples/data_mixing_trainer.py
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from adaptive_bilevel import AutoSLS, BiSLS, monitor
from adaptive_bilevel.hypergradient import Lanczos, implicit

SOLVER, PRODUCTS = Lanczos(5), "difference"  # attention may be fused, which has no second derivatives


class SourceWeights(Trainer):
    """A Trainer that also learns a weight for each data source; one step of the weights after `every` of the model.

    Args:
        sources: Number of sources. An example of `train_dataset` has its number in "source"; set the argument
            `remove_unused_columns=False`.
        held_out: A batch (a dictionary) of the text that the weights are judged by.
        every: Lower steps for each upper one.
        options: Those of `Trainer`.
    """

    optimizer: torch.optim.Optimizer | None
    inner: AutoSLS
    outer: BiSLS

    def __init__(self, *args: Any, sources: int, held_out: dict[str, Tensor], every: int = 1, **options: Any) -> None:
        super().__init__(*args, **options)
        if self.args.fp16:
            raise ValueError("fp16=True: gradients are evaluated inside of the steps, unscaled; use bf16=True")
        self.held_out = {name: tensor.to(self.args.device) for name, tensor in held_out.items()}
        self.weights = torch.zeros(sources, device=self.args.device, requires_grad=True)  # softmax of them
        self.every, self.batches, self.loss = every, list[dict[str, Tensor]](), torch.zeros(())

    def create_optimizer(self, model: Any = None) -> Any:
        if self.optimizer is None:
            hypergradient = partial(implicit, solver=SOLVER, products=PRODUCTS)
            self.optimizer = self.inner = AutoSLS((model or self.model).parameters(), direction="adam")
            self.inner.host = self
            self.outer = BiSLS(
                [self.weights],
                lower=self.inner,
                direction="adam",
                hypergradient=hypergradient,
                solver=SOLVER,
                products=PRODUCTS,
            )
        return self.optimizer

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **unused: Any) -> Any:
        """Return the weighted mean of a batch of several sources, and the mean of one without "source"."""
        inputs = dict(inputs)
        source, labels = inputs.pop("source", None), inputs.pop("labels")
        outputs = model(**inputs)
        losses = cross_entropy(outputs.logits[:, :-1].transpose(1, 2).float(), labels[:, 1:], reduction="none").mean(1)
        if source is not None:
            losses = losses * self.weights.softmax(0)[source] * len(self.weights)
        loss = losses.mean()
        return (loss, outputs) if return_outputs else loss

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Keep a batch; the last one of an update takes the steps of both levels."""
        model.train()
        self.batches.append(self._prepare_inputs(inputs))
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)
        batches, self.batches = self.batches, []
        self.loss = self.inner.step(lambda: sum(self.compute_loss(model, batch) for batch in batches) / len(batches))
        if (self.state.global_step + 1) % self.every == 0:
            self.outer.step(lambda: self.compute_loss(model, self.held_out))
        return self.loss.detach()

    def step(self, optimizer: Any) -> Tensor:
        """As the host of the optimizer, take the Trainer's `optimizer.step()`: `training_step` has taken the step."""
        return self.loss

    def log(self, logs: dict[str, Any], *args: Any, **options: Any) -> None:
        if self.outer.record is not None:
            logs |= monitor(self.outer, words=False)
        super().log(logs, *args, **options)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        torch.save({"weights": self.weights.detach(), "outer": self.outer.state_dict()}, Path(output_dir, "upper.pt"))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            saved = torch.load(Path(checkpoint, "upper.pt"), weights_only=True)
            self.weights.data.copy_(saved["weights"])
            self.outer.load_state_dict(saved["outer"])


def text(language: int | None, sequences: int, seed: int, vocabulary: int = 16, length: int = 16) -> Tensor:
    """Return sequences of a language, a Markov chain; None: of noise."""
    generator = torch.Generator().manual_seed(seed)
    if language is None:
        return torch.randint(vocabulary, (sequences, length), generator=generator)
    rule = torch.Generator().manual_seed(1000 + language)
    chances = (2.5 * torch.randn(vocabulary, vocabulary, generator=rule)).softmax(1)
    written = [torch.randint(vocabulary, (sequences,), generator=generator)]
    while len(written) < length:
        written.append(torch.multinomial(chances[written[-1]], 1, generator=generator).squeeze(1))
    return torch.stack(written, 1)


def data(sequences: int = 64) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """Return examples of three sources, and a held-out batch."""
    sources = [text(language, sequences, seed) for seed, language in enumerate((0, 1, None))]
    examples = [{"input_ids": t, "labels": t, "source": k} for k, tokens in enumerate(sources) for t in tokens]
    tokens = text(0, sequences, seed=10)
    return examples, {"input_ids": tokens, "labels": tokens}


def gpt2(dropout: float = 0.1, attention: str | None = None) -> Any:
    torch.manual_seed(0)
    drops = {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout}
    size = {"vocab_size": 16, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(**size, **drops, bos_token_id=0, eos_token_id=0, attn_implementation=attention))


def main() -> None:
    examples, held_out = data()
    with TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=120,
            per_device_train_batch_size=24,
            logging_steps=30,
            remove_unused_columns=False,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = SourceWeights(gpt2(), arguments, train_dataset=examples, sources=3, held_out=held_out, every=3)
        trainer.train()
    print("weights:", [round(w, 2) for w in trainer.weights.detach().softmax(0).tolist()])


if __name__ == "__main__":
    main()
