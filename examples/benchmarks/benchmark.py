"""The benchmarks of the suite: what is run on which task, and which bars it is held against."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from grid import Grid
from methods import PEERS, SINGLE_LEVEL
from tasks import SINGLE_LEVEL as SINGLE_LEVEL_TASKS

SEEDS = (0, 1, 2)
FIRST_TRIALS = ("1e-2", "10", "1e4")
SINGLE_PEERS = tuple(peer for peer in PEERS if peer in SINGLE_LEVEL)
NETWORKS = ("hyper-representation", "hyper-representation-lenet", "few-shot")
TUNING_FREE = ("s-tfbo", "d-tfbo:lower_steps=10,auxiliary_steps=10")  # without caps, D-TFBO ends in its first iteration
BOUNDS = ("1", "10", "100", "1e3", "1e4", "1e5")


@dataclass(frozen=True)
class Benchmark:
    """A task and the methods on it.

    Attributes:
        title: what the figure is called.
        task: a name of `tasks`.
        settings: arguments and settings of the task.
        ours: this package's methods with no number given.
        first_trials: the same with first trials or bounds over decades.
        others: methods that are run as they are.
        grids: baselines with a grid of steps.
        resolved: whether F(x) = f(x, y*(x)) counts too, where the task can solve for y*.
        spread: the most that largest over smallest final loss of the first trials may be.
        seeds: all runs of `ours`, `first_trials`, `others` and the best of the grids.
    """

    title: str
    task: str
    ours: tuple[str, ...]
    first_trials: tuple[str, ...]
    others: tuple[str, ...]
    grids: tuple[Grid, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    resolved: bool = True
    spread: float = 1.25
    seeds: tuple[int, ...] = SEEDS

    @property
    def single_level(self) -> bool:
        return self.task in SINGLE_LEVEL_TASKS

    def quick(self) -> Benchmark:
        """A few iterations, one seed, two first trials, small grids."""
        iterations = 40 if self.single_level else 4
        return replace(
            self,
            title=f"{self.title} (quick)",
            settings={**self.settings, "iterations": iterations, "evaluate_every": iterations // 2},
            first_trials=self.first_trials[::3],
            grids=tuple(grid.smaller() for grid in self.grids[:2]),
            others=self.others[:1],
            seeds=self.seeds[:1],
        )


def bilevel(
    title: str,
    task: str,
    *,
    adam: tuple[float, ...],
    sgd: tuple[float, ...],
    lowers: tuple[float | str, ...] = (),
    paper: str = "",
    others: tuple[str, ...] = (),
    spread: float = 1.25,
    resolved: bool = True,
    **settings: Any,
) -> Benchmark:
    """Ours with no number at either level; grids of Adam, SGD and decaying SGD; the peers by their own defaults.

    The first of `lowers` is the rule that ours and the peers have at the lower level, without a number: "auto" is
    README's, "search" that for loops that start anew. Without `lowers` the lower rule belongs to the task, and
    everybody has that one. With `paper`, a solver of the task's settings, all have the package's own hypergradient, and
    there are grids with that solver as well.
    """
    kinds = ("bisls-adam", "bisls-sgd")
    both = {"adam": adam, "sgd": sgd}
    search, also = (f":lower={lowers[0]}", f":lower={lowers[0]},") if lowers else ("", ":")
    return Benchmark(
        title=title,
        task=task,
        ours=tuple(f"{kind}{search}" for kind in (*kinds, "bisps")),
        first_trials=tuple(f"{kind}{also}lr={lr}" for kind in kinds for lr in FIRST_TRIALS),
        others=(*others, *(() if task in NETWORKS else TUNING_FREE), *(f"{peer}{search}" for peer in PEERS)),
        grids=(
            *(Grid(name, lrs, lowers) for name, lrs in both.items()),
            Grid("sgd", sgd, lowers[::2], options={"decay": "inverse_sqrt"}),
            *([Grid(name, lrs, lowers, options={"solver": paper}) for name, lrs in both.items()] if paper else ()),
        ),
        settings={**settings, **({"solver": "default"} if paper else {})},
        spread=spread,
        resolved=resolved,
    )


def single(title: str, task: str, **settings: Any) -> Benchmark:
    """SPSB and SLSB with no number, and with bounds over six decades; the other rules at the paper's bound, 1000."""
    anew = ",reset=initial"  # option 1 of the paper: each search starts at the bound
    kinds = {"spsb": "", "slsb": anew}
    return Benchmark(
        title=title,
        task=task,
        ours=tuple(kinds),
        first_trials=tuple(f"{kind}:lr={lr}{reset}" for kind, reset in kinds.items() for lr in BOUNDS),
        others=("sps-max:lr=1e3", "decsps:lr=1e3", f"sls:lr=1e3{anew}", "sls", *SINGLE_PEERS),
        grids=(
            Grid("sgd", (1e-2, 1e-1, 1.0, 10.0, 100.0, 1e3), options={"decay": "inverse_sqrt"}),
            Grid("sgd", (1e-2, 1e-1, 1.0, 10.0, 100.0)),
            Grid("adam", (1e-4, 1e-3, 1e-2, 1e-1)),
        ),
        settings=settings,
    )


def _cleaning(title: str, **settings: Any) -> Benchmark:
    return bilevel(
        f"Data hyper-cleaning, 14x14, T=5, {title}", "hyper-cleaning", paper="cg",
        adam=(1e-3, 1e-2, 1e-1, 1.0), sgd=(1.0, 10.0, 1e2, 1e3, 1e4), lowers=("auto", 0.1, 1.0, 10.0), **settings,
    )  # fmt: skip


def _penalties(title: str, **settings: Any) -> Benchmark:
    return bilevel(
        f"Regularisation selection, T=10, {title}", "regularisation", paper="cg",
        adam=(1e-3, 1e-2, 1e-1, 1.0), sgd=(1e-1, 1.0, 10.0, 1e2, 1e3), lowers=("auto", 0.01, 0.1, 1.0), **settings,
    )  # fmt: skip


def _representation(title: str, task: str = "hyper-representation", **settings: Any) -> Benchmark:
    """Without `paper`, the paper's CG at all places and its search below."""
    return bilevel(
        f"Hyper-representation, MNIST, T=10, {title}", task,
        adam=(1e-4, 1e-3, 1e-2, 1e-1), sgd=(1e-3, 1e-2, 1e-1, 1.0), spread=1.1,
        **{"lowers": ("search", 0.01, 0.1, 1.0), **settings},
    )  # fmt: skip


def _distillation(title: str, **settings: Any) -> Benchmark:
    """The lower step is a part of the task: T steps of it are what the images are distilled for, as in the paper."""
    return bilevel(
        f"Data distillation, MNIST, ten images, {title}", "distillation",
        adam=(1e-3, 1e-2, 1e-1, 1.0), sgd=(1.0, 10.0, 1e2, 1e3), resolved=False, **settings,
    )  # fmt: skip


def _below(title: str, task: str, **settings: Any) -> Benchmark:
    """A network below: ours with no number against grids with three kinds of hypergradients."""
    kinds: tuple[dict[str, Any], ...] = ({}, {"solver": "neumann"}, {"solver": "unroll"})
    grids = {"adam": (1e-2, 1e-1, 1.0), "sgd": (1e-1, 1.0, 10.0)}
    return Benchmark(
        title=f"{title}, T=10",
        task=task,
        ours=("bisls-adam", "bisls-sgd"),
        first_trials=(),
        others=(),
        grids=tuple(
            Grid(name, lrs, then=(0.1, 0.3, 1.0), options=kind) for kind in kinds for name, lrs in grids.items()
        ),
        settings=settings,
    )


QUICK = (  # one of a kind
    "hyper-cleaning", "penalties-a9a", "hyper-representation", "distillation", "few-shot", "label-noise", "phishing",
    "lenet-mnist",
)  # fmt: skip
BELOW: dict[str, tuple[str, str, dict[str, Any]]] = {  # on digits, each by full batch and by minibatches
    "label-noise": ("Label noise, MLP 64-32-10", "label-noise", {}),
    "label-noise-tanh": ("Label noise, tanh 64-32-32-10", "label-noise", {"model": "tanh"}),
    "weight-decay-tensor": ("Weight decay per tensor, MLP 64-32-32-10", "weight-decay", {}),
    "weight-decay-layer": ("Weight decay per layer, MLP 64-32-32-10", "weight-decay", {"per_layer": True}),
    "meta-weight": ("Meta-weight-net, MLP 64-32-10", "meta-weight", {}),
    "architecture": ("Architecture search, cell of three edges", "architecture", {}),
    "smoothing": ("Label smoothing and input noise, MLP 64-32-10", "smoothing", {}),
}
_OWN: dict[str, Any] = {"paper": "cg", "lowers": ("auto", 0.01, 0.1, 1.0)}
_STEP = "response=step,baseline=matched,response_steps=20"
BENCHMARKS: dict[str, Benchmark] = {
    "hyper-cleaning": _cleaning("MNIST, 40 % noise, full batch"),
    "hyper-cleaning-60": _cleaning("MNIST, 60 % noise, full batch", noise=0.6),
    "hyper-cleaning-fashion": _cleaning("Fashion-MNIST, 40 % noise, full batch", name="fashion_mnist"),
    "hyper-cleaning-fashion-60": _cleaning("Fashion-MNIST, 60 % noise, full batch", name="fashion_mnist", noise=0.6),
    "hyper-cleaning-minibatch": _cleaning("MNIST, 40 % noise, batches of 128", lower_batch=128, upper_batch=128),
    "hyper-cleaning-fashion-minibatch": _cleaning(
        "Fashion-MNIST, 40 % noise, batches of 128", name="fashion_mnist", lower_batch=128, upper_batch=128
    ),
    "ridge-a9a": _penalties("ridge, one penalty, a9a", kind="ridge", per_feature=False),
    "logistic-a9a": _penalties("logistic, one penalty, a9a", per_feature=False),
    "penalties-a9a": _penalties("logistic, a penalty per feature, a9a"),
    "penalties-news20": _penalties(
        "softmax, a penalty per feature, news20", kind="softmax", name="news20_small", iterations=40
    ),
    "hyper-representation": _representation("MLP, 14x14, batch 256", **_OWN),
    "hyper-representation-cg10": _representation("MLP, 14x14, batch 256, CG 10", solver_steps=10),
    "hyper-representation-lenet": _representation("LeNet, 28x28, batch 128", "hyper-representation-lenet", **_OWN),
    "hyper-representation-lenet-cg10": _representation(
        "LeNet, 28x28, batch 128, CG 10", "hyper-representation-lenet", solver_steps=10
    ),
    "distillation": _distillation("14x14, T=20", paper="neumann"),
    "distillation-50": _distillation("14x14, T=50, Neumann", lower_steps=50, solver_steps=50),
    "distillation-cg": _distillation("14x14, T=20, CG 10", solver="cg", solver_steps=10),
    "distillation-identity": _distillation(
        "14x14, T=20, identity", solver="identity",
        others=(f"bisls-sgd:{_STEP}", f"bisls-adam:{_STEP}"),
    ),
    "distillation-28": _distillation("28x28, T=20, Neumann", pooled=False, iterations=200),
    "few-shot": bilevel(
        "Few-shot, Omniglot, 5-way 5-shot, T=5", "few-shot", paper="cg",
        adam=(1e-4, 1e-3, 1e-2, 1e-1), sgd=(1e-2, 1e-1, 1.0, 10.0), lowers=("search", 0.01, 0.1, 1.0),
    ),
    **{
        name if batch == 0 else f"{name}-minibatch": _below(
            f"{title}, {f'batches of {batch}' if batch else 'full batch'}", task,
            **({"lower_batch": batch, "upper_batch": batch} if batch else {}), **settings,
        )
        for name, (title, task, settings) in BELOW.items()
        for batch in (0, 128)
    },
    "label-noise-lenet": _below(
        "Label noise, MNIST, LeNet, batches of 64", "label-noise", name="mnist", model="lenet",
        lower_batch=64, upper_batch=64,
    ),
    "label-noise-lenet-fashion": _below(
        "Label noise, Fashion-MNIST, LeNet, batches of 64", "label-noise", name="fashion_mnist", model="lenet",
        lower_batch=64, upper_batch=64,
    ),
    "start-of-few-shot": _below("Start of few-shot networks, Omniglot, 5-way 5-shot", "start-of-few-shot"),
    **{
        name: single(f"Logistic regression, {name}, batch 100, 10 epochs", "logistic-regression", name=name)
        for name in ("w8a", "a9a", "mushrooms", "phishing")
    },
    "lenet-mnist": single("LeNet, MNIST, batch 128, 3 epochs of 8,000 images", "lenet"),
    "lenet-fashion": single("LeNet, Fashion-MNIST, batch 128, 3 epochs of 8,000 images", "lenet", name="fashion_mnist"),
}  # fmt: skip
