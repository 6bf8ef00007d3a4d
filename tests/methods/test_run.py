"""How a run behaves: variables of any arrangement, batches, records, early stop, resuming, and what goes wrong."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from adaptive_bilevel import methods, policies
from adaptive_bilevel.errors import AdaptiveBilevelWarning, ClosureError, NonFiniteError, OptionError, TensorError
from adaptive_bilevel.hypergradient import CG, Implicit, Neumann
from adaptive_bilevel.methods import rows
from tests.methods.test_rows import finite, problem_of, run
from tests.optim.helpers import Net, net, plain
from tests.problems import b2, ridge_hpo

# ---------------------------------------------------------------------------------------------- TFBO on b2


def tfbo(name: str, iterations: int, initial: float) -> list[float]:
    """||grad F(x_k)||, k = 0..iterations, from x = (3, -2), y = v = 0."""
    problem, single = b2(), name == "s-tfbo"
    x0 = torch.tensor([3.0, -2.0])
    constant = problem.dF(torch.zeros(2))
    J = torch.stack([problem.dF(e) - constant for e in torch.eye(2)], dim=1)
    records = methods.run(
        name,
        problem_of(problem),
        x0,
        torch.zeros(3),
        iterations=iterations,
        upper_step=policies.GradientNorm(initial=initial, coupling="product" if single else "none"),
        lower_step=policies.GradientNorm(initial=initial),
        auxiliary_step=policies.GradientNorm(initial=initial, coupling="max" if single else "none"),
    )
    return [float((constant + J @ x).norm()) for x in (x0, *(record.x for record in records))]


def squares(norms: list[float], T: int) -> float:
    """(1/T) sum_{t<T} ||grad F(x_t)||^2."""
    return sum(n * n for n in norms[:T]) / T


def test_d_tfbo_on_b2() -> None:
    """Values of the reference. Over T = 10..3000 their slope is -.98 (-.95 over the three here)."""
    means = {T: squares(tfbo("d-tfbo", T, 1.0), T) for T in (10, 30, 60)}
    expected = {10: 221.5976595881761, 30: 77.85762450561678, 60: 40.21853400314862}
    assert means == pytest.approx(expected, rel=1e-9)
    slope = math.log(means[60] / means[10]) / math.log(6)
    assert slope == pytest.approx(-0.95, abs=0.01)


def test_s_tfbo_on_b2() -> None:
    """Values of the reference. Over T = 10..3000 their slope is -.42, steepening; ||grad F|| at 2000 is 3.95."""
    norms = tfbo("s-tfbo", 300, 1.0)
    expected = {10: 944.6636670431915, 30: 772.0521827154503, 100: 571.586175835268, 300: 385.9588106620679}
    assert {T: squares(norms, T) for T in expected} == pytest.approx(expected, rel=1e-9)
    assert norms[300] == pytest.approx(14.808740564394146, rel=1e-9)


def test_accumulators_only_grow_and_the_stop_is_kept() -> None:
    problem = b2()
    for record in run("d-tfbo", problem, 20):
        for name in "yv":
            steps = [r.step_size for r in record.records[name]]
            assert all(a >= b for a, b in itertools.pairwise(steps))
    upper = [record.steps.upper for record in run("s-tfbo", problem, 30)]
    assert all(a >= b for a, b in itertools.pairwise(upper))


# ---------------------------------------------------------------------------------------------- arrangements


def trees() -> tuple[methods.BilevelProblem, dict[str, Any], dict[str, Any]]:
    problem = ridge_hpo()

    def x_of(x: Any) -> Tensor:
        return torch.cat([x["a"], x["rest"][0], x["rest"][1]["b"]])

    def y_of(y: Any) -> Tensor:
        return torch.cat([y["w"].reshape(-1), y["bias"]])

    built = methods.BilevelProblem(
        upper_loss=lambda x, y, _: problem.f(x_of(x), y_of(y)), lower_loss=lambda x, y, _: problem.g(x_of(x), y_of(y))
    )
    x, y = problem.x0, problem.y0
    return built, {"a": x[:2], "rest": (x[2:3], {"b": x[3:]})}, {"w": y[:4].reshape(2, 2), "bias": y[4:]}


@pytest.mark.filterwarnings("ignore:.*descend")
@pytest.mark.parametrize("name", methods.names())
def test_trees_of_tensors_give_what_one_tensor_gives(name: str) -> None:
    problem, x, y = trees()
    options: dict[str, Any] = {} if name == "d-tfbo" else {"lower_steps": 2}
    whole = run(name, ridge_hpo(), 3, **options)
    parts = list(methods.run(name, problem, x, y, iterations=3, **options))
    for one, many in zip(whole, parts, strict=True):
        assert torch.allclose(one.x, torch.cat([many.x["a"], many.x["rest"][0], many.x["rest"][1]["b"]]), atol=1e-10)
        assert torch.allclose(one.y, torch.cat([many.y["w"].reshape(-1), many.y["bias"]]), atol=1e-10)
        assert one.evaluations == many.evaluations
    assert set(parts[-1].hypergradient) == {"a", "rest"}


def data(count: int = 48) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(3)
    return torch.randn(count, 6, generator=rng), torch.randint(3, (count,), generator=rng)


def network_problem() -> methods.BilevelProblem:
    return methods.BilevelProblem(
        upper_loss=lambda x, model, batch: cross_entropy(model(batch[0]), batch[1]),
        lower_loss=lambda x, model, batch: cross_entropy(model(batch[0] * x.exp()), batch[1]),
    )


@pytest.mark.parametrize("name", ["soba", "sustain", "unroll-truncated", "bisls-adam", "bisls-sgd"])
def test_modules_with_batch_norm_and_dropout(name: str) -> None:
    model = net()
    before, random = plain(model.state_dict()), torch.get_rng_state()
    batches = methods.Minibatches(data(), data(), size=16)
    options: dict[str, Any] = {"lower_steps": 2} if "bisls" in name else {}
    if name in ("sustain",):
        options["estimator"] = Implicit(Neumann(2, 0.1))
    records = list(
        methods.run(name, network_problem(), torch.zeros(6), model, iterations=4, batches=batches, **options)
    )
    assert plain(model.state_dict()) == before
    assert torch.equal(random, torch.get_rng_state())
    last = records[-1]
    assert set(last.y) == {key for key, _ in model.named_parameters()}
    assert last.losses.lower != records[0].losses.lower
    missing = Net()
    missing.load_state_dict({**missing.state_dict(), **last.y})


def test_frozen_parameters_of_a_module_stay() -> None:
    model = net(dropout=0.0)
    for p in model.first.parameters():
        p.requires_grad_(False)
    pair = methods.Pair(data(), data())
    (record,) = methods.run("soba", network_problem(), torch.zeros(6), model, iterations=1, batches=[pair])
    assert not any(key.startswith("first") for key in record.y)
    for p in model.parameters():
        p.requires_grad_(False)
    with pytest.raises(TensorError, match="y holds no tensor"):
        methods.run("soba", network_problem(), torch.zeros(6), model, iterations=1)


@pytest.mark.parametrize(
    "wrong", [torch.arange(3), torch.ones(2, dtype=torch.complex64), torch.eye(2).to_sparse(), [], "y"]
)
def test_variables_that_cannot_be_stepped(wrong: Any) -> None:
    with pytest.raises(TensorError, match=r"^y"):
        methods.run("soba", problem_of(b2()), b2().x0, wrong, iterations=1)


def test_inputs_are_never_changed() -> None:
    problem = ridge_hpo()
    x, y = problem.x0.clone().requires_grad_(), problem.y0.clone()
    for name in methods.names():
        methods.run(name, problem_of(problem), x, y, iterations=1).__next__()
    assert torch.equal(x.detach(), problem.x0) and torch.equal(y, problem.y0) and x.grad is None


@pytest.mark.filterwarnings("ignore:.*sufficient decrease", "ignore:.*slope", "ignore:.*descend")
@pytest.mark.parametrize("name", methods.names())
def test_dtypes_stay_what_they_were(name: str) -> None:
    """Low precision, and tensors of several dtypes in one level."""
    options: dict[str, Any] = {} if name == "d-tfbo" else {"lower_steps": 2}
    problem = methods.BilevelProblem(
        upper_loss=lambda x, y, _: (y["a"] - 1).square().sum() + y["b"].float().square().sum(),
        lower_loss=lambda x, y, _: (y["a"] - x).square().sum() + (y["b"].float() - x.float()).square().sum(),
    )
    for one, other in ((torch.float32, torch.float64), (torch.bfloat16, torch.float32)):
        x, y = torch.zeros(2, dtype=one), {"a": torch.zeros(2, dtype=one), "b": torch.ones(2, dtype=other)}
        *_, record = methods.run(name, problem, x, y, iterations=2, **options)
        assert (record.x.dtype, record.y["a"].dtype, record.y["b"].dtype) == (one, one, other)
        assert all(bool(t.isfinite().all()) for t in (record.x, record.y["a"], record.y["b"]))


# ---------------------------------------------------------------------------------------------- batches


def test_minibatches() -> None:
    x = torch.arange(10.0)
    batches = methods.Minibatches({"a": x, "b": [x]}, (x, x), size=(3, 4), seed=1)
    first = batches.draw()
    assert torch.equal(first.upper["a"], first.upper["b"][0]) and first.upper["a"].shape == (3,)
    assert first.lower[0].shape == (4,) and first.upper_id is None
    place = batches.state_dict()
    following = [batches.draw().lower[0] for _ in range(3)]
    batches.load_state_dict(place)
    assert all(torch.equal(a, batches.draw().lower[0]) for a in following)


def test_blocks_are_a_partition() -> None:
    x = torch.arange(10.0)
    batches = methods.Minibatches(x, x, size=(3, 5), blocks=True)
    seen: dict[Any, Tensor] = {}
    for _ in range(100):
        pair = batches.draw()
        assert torch.equal(seen.setdefault(pair.upper_id, pair.upper), pair.upper)
    assert sorted(torch.cat(list(seen.values())).tolist()) == x.tolist() and len(seen) == 4


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"size": 0}, "size"), ({"size": 99}, "only 10"), ({"size": (1, 2, 3)}, "size"), ({"size": 2.5}, "size")],
)
def test_wrong_minibatches(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(OptionError, match=reason):
        methods.Minibatches(torch.ones(10), torch.ones(10), **options)
    with pytest.raises(OptionError, match="first dimension"):
        methods.Minibatches((torch.ones(10), torch.ones(9)), torch.ones(10), size=2)


def test_data_loaders() -> None:
    loader = DataLoader(TensorDataset(*data()), batch_size=16)
    batches = methods.Loaders(loader, loader)
    records = list(methods.run("soba", network_problem(), torch.zeros(6), net(), iterations=7, batches=batches))
    assert len(records) == 7  # three batches an epoch


class Counting:
    """Pairs (f's batch, g's batch), with what was drawn."""

    def __init__(self) -> None:
        self.drawn = 0

    def __iter__(self) -> Iterator[tuple[float, float]]:
        while True:
            self.drawn += 1
            yield float(self.drawn), float(self.drawn)


@pytest.mark.parametrize(("fresh", "drawn"), [(False, 3), (True, 3 * 4)])
def test_fresh_batches(fresh: bool, drawn: int) -> None:
    seen: list[float] = []

    def lower(x: Tensor, y: Tensor, batch: float) -> Tensor:
        seen.append(batch)
        return (y - x - batch).square().sum()

    problem = methods.BilevelProblem(upper_loss=lambda x, y, b: (y.square() + b).sum(), lower_loss=lower)
    batches = Counting()
    options: dict[str, Any] = {"lower_steps": 4, "fresh_batches": fresh, "solver": Neumann(2, 0.1)}
    list(methods.run("stocbio", problem, torch.ones(2), torch.ones(2), iterations=3, batches=batches, **options))
    assert batches.drawn == drawn
    assert len(set(seen)) == drawn


def test_independent_products() -> None:
    """With fresh batches each factor of the random Neumann term gets its own."""
    seen: list[float] = []

    def lower(x: Tensor, y: Tensor, batch: float) -> Tensor:
        seen.append(batch)
        return 0.5 * (y - x).square().sum() * batch

    problem = methods.BilevelProblem(upper_loss=lambda x, y, _: y.square().sum(), lower_loss=lower)
    solver = Neumann(6, 0.01, random=True)
    options: dict[str, Any] = {"solver": solver, "fresh_batches": True, "lower_step": 0.01}
    for _ in methods.run("alset", problem, torch.ones(2), torch.zeros(2), iterations=8, batches=Counting(), **options):
        pass
    assert len(set(seen)) > 8 + 5


@pytest.mark.parametrize("wrong", [3, [1, 2], [(1, 2, 3)], []])
def test_wrong_batches(wrong: Any) -> None:
    with pytest.raises(OptionError, match=r"batches|pair"):
        list(methods.run("soba", problem_of(b2()), b2().x0, b2().y0, iterations=2, batches=wrong))


def test_saga_needs_to_know_the_summand() -> None:
    with pytest.raises(OptionError, match="blocks=True"):
        list(methods.run("saba", problem_of(b2()), b2().x0, b2().y0, iterations=2, batches=[(None, None)]))


# ---------------------------------------------------------------------------------------------- records


def test_records_are_those_of_the_iteration() -> None:
    problem = ridge_hpo()
    records = run("stocbio", problem, 4, lower_steps=3, solver=Neumann(2, 0.1))
    y, x = problem.y0, problem.x0
    for k, record in enumerate(records):
        for _ in range(3):
            lower = float(problem.g(x, y))
            y = y - 0.1 * problem.gradient_y(x, y)
        assert record.iteration == k
        assert record.losses.upper == pytest.approx(float(problem.f(x, y)))
        assert record.losses.lower == pytest.approx(lower)
        assert record.steps == (0.1, 0.1) and len(record.records["y"]) == 3
        assert torch.allclose(record.y, y) and torch.allclose(record.x, x - 0.1 * record.hypergradient)
        assert record.total_cost == pytest.approx((k + 1) * (1 + 3 + 2 * 2.2 + 1))
        assert str(record).startswith(f"iteration {k}: f ")
        x = record.x


def test_a_generator_of_records_can_be_left_early() -> None:
    stream = methods.run("soba", problem_of(b2()), b2().x0, b2().y0, iterations=10)
    assert [next(stream).iteration, next(stream).iteration] == [0, 1]
    assert len(list(stream)) == 8
    assert list(stream) == []


def test_early_stop() -> None:
    records = run("ba", ridge_hpo(), 50, stop=lambda record: record.iteration == 4)
    assert len(records) == 5


def test_progress(capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[int] = []
    run("soba", b2(), 3, progress=lambda record: seen.append(record.iteration))
    assert seen == [0, 1, 2] and capsys.readouterr().err == ""
    run("soba", b2(), 3, progress=True)
    shown = capsys.readouterr().err
    assert shown.count("\r") == 3 and shown.endswith("of 3\n")


# ---------------------------------------------------------------------------------------------- resuming

OPTIONS: dict[str, dict[str, Any]] = {
    "bisls-sgd": {"lower_steps": 2},
    "bisls-adam": {"lower_steps": 2},
    "saba": {"batches": "blocks"},
    "srba": {"batches": "blocks"},
    "aid-bio": {"solver": CG(2, 0.0, warm_start=True)},
}


def stochastic() -> tuple[methods.BilevelProblem, Tensor, dict[str, Tensor]]:
    """Softmax regression with weights exp(x) on the features, and dropout."""

    def loss(x: Tensor, y: dict[str, Tensor], batch: Any) -> Tensor:
        dropped = nn.functional.dropout(batch[0] * x.exp(), 0.2)
        return cross_entropy(dropped @ y["w"] + y["b"], batch[1]) + 0.05 * (
            y["w"].square().sum() + y["b"].square().sum()
        )

    problem = methods.BilevelProblem(upper_loss=loss, lower_loss=loss)
    return problem, torch.zeros(6), {"w": torch.zeros(6, 3), "b": torch.zeros(3)}


def start(name: str, iterations: int = 6, **more: Any) -> methods.Run:
    options = {**OPTIONS.get(name, {}), **more}
    batches = methods.Minibatches(data(), data(), size=12, blocks=options.pop("batches", None) == "blocks", seed=5)
    problem, x, y = stochastic()
    return methods.run(name, problem, x, y, iterations=iterations, batches=batches, seed=11, **options)


def told(records: list[methods.IterationRecord]) -> Any:
    return repr(
        [(plain(r.x), plain(r.y), r.losses, r.records, r.evaluations, r.total, plain(r.auxiliary)) for r in records]
    )


@pytest.mark.filterwarnings("ignore:.*sufficient decrease", "ignore:.*slope", "ignore:.*did not bring")
@pytest.mark.parametrize("name", methods.names())
def test_resume_is_bitwise(name: str, tmp_path: Path) -> None:
    more: dict[str, Any] = {"lower_steps": 20, "auxiliary_steps": 20} if name == "d-tfbo" else {"lower_steps": 3}
    whole = list(start(name, **more))
    stream = start(name, **more)
    first = [next(stream) for _ in range(3)]
    torch.save(stream.state_dict(), tmp_path / "state.pt")
    torch.manual_seed(99)  # the global random state has no part in it
    second = list(start(name, resume=torch.load(tmp_path / "state.pt", weights_only=True), **more))
    assert told(first + second) == told(whole)


def test_resume_in_another_process(tmp_path: Path) -> None:
    stream = start("bisls-adam")
    for _ in range(3):
        next(stream)
    torch.save(stream.state_dict(), tmp_path / "state.pt")
    code = (
        "import torch, json; torch.set_default_dtype(torch.float64); torch.set_num_threads(1)\n"
        "from tests.methods.test_run import start\n"
        f"state = torch.load({str(tmp_path / 'state.pt')!r}, weights_only=True)\n"
        "print(json.dumps([r.x.tolist() for r in start('bisls-adam', resume=state)]))"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [r.x.tolist() for r in stream]


def test_a_state_belongs_to_its_row_and_shapes() -> None:
    state = methods.run("soba", problem_of(b2()), b2().x0, b2().y0, iterations=3).state_dict()
    with pytest.raises(OptionError, match="'soba'"):
        methods.run("saba", problem_of(b2()), b2().x0, b2().y0, iterations=3, resume=state)
    with pytest.raises(OptionError, match="saved with shapes"):
        methods.run("soba", problem_of(b2()), torch.ones(3), b2().y0, iterations=3, resume=state)


# ---------------------------------------------------------------------------------------------- what goes wrong


class Faulty:
    """A problem whose losses return NaN at one call."""

    def __init__(self, at: int) -> None:
        self.problem, self.at, self.calls = ridge_hpo(), at, 0

    def spoil(self, loss: Tensor) -> Tensor:
        self.calls += 1
        return loss * math.nan if self.calls - 1 == self.at else loss

    def made(self) -> methods.BilevelProblem:
        return methods.BilevelProblem(
            upper_loss=lambda x, y, _: self.spoil(self.problem.f(x, y)),
            lower_loss=lambda x, y, _: self.spoil(self.problem.g(x, y)),
        )


@pytest.mark.filterwarnings("ignore:.*sufficient decrease", "ignore:.*slope", "ignore:.*did not bring")
@pytest.mark.parametrize("name", methods.names())
def test_a_number_that_is_not_finite_moves_nothing_to_where_it_is_not(name: str) -> None:
    options: dict[str, Any] = {"lower_steps": 2} if name != "d-tfbo" else {"lower_steps": 5, "auxiliary_steps": 5}
    for at in range(0, 12, 2):
        faulty = Faulty(at)
        x, y = faulty.problem.x0, faulty.problem.y0
        records = list(methods.run(name, faulty.made(), x, y, iterations=3, **options))
        assert finite(records), at
        assert all(bool(torch.isfinite(v).all()) for r in records for v in r.auxiliary.values()), at
        assert not torch.equal(records[-1].y, y) or rows.ROWS[name].start.get("y") == "first"


def test_too_many_in_a_row_raise() -> None:
    problem = methods.BilevelProblem(lambda x, y, _: (x * math.nan).sum(), lambda x, y, _: (y - x).square().sum())
    stream = methods.run("soba", problem, torch.ones(2), torch.zeros(2), iterations=50, max_skips=5)
    with pytest.raises(NonFiniteError, match="5 iterations in a row"):
        list(stream)


def test_a_loss_below_its_bound_is_said_once() -> None:
    problem = methods.BilevelProblem(lambda x, y, _: y.square().sum(), lambda x, y, _: (y - x).square().sum() - 50)
    with pytest.warns(AdaptiveBilevelWarning, match="below lower_bound") as caught:
        list(methods.run("bisls-sgd", problem, torch.ones(2), torch.zeros(2), iterations=3))
    assert sum("below lower_bound" in str(w.message) for w in caught) == 1
    assert caught[0].filename == __file__


def test_a_cap_that_was_reached_is_said_once() -> None:
    with pytest.warns(AdaptiveBilevelWarning, match="lower_steps") as caught:
        run("d-tfbo", b2(), 4, lower_steps=1, auxiliary_steps=1, tolerance=1e-12)
    assert len(caught) == 1 and "tests" in caught[0].filename


@pytest.mark.parametrize(
    ("error", "arguments"),
    [
        (OptionError, {"iterations": 0}),
        (OptionError, {"iterations": 2.5}),
        (OptionError, {"max_skips": 0}),
        (OptionError, {"seed": -1}),
        (OptionError, {"v": torch.ones(7)}),
        (OptionError, {"problem": "b2"}),
        (OptionError, {"name": "sbo"}),
    ],
    ids=str,
)
def test_wrong_arguments(error: type[Exception], arguments: dict[str, Any]) -> None:
    given: dict[str, Any] = {"name": "soba", "problem": problem_of(b2()), "iterations": 2, **arguments}
    with pytest.raises(error, match=r"methods\.run\("):
        methods.run(given.pop("name"), given.pop("problem"), b2().x0, b2().y0, **given)


def test_wrong_losses() -> None:
    with pytest.raises(ClosureError, match="upper_loss"):
        methods.BilevelProblem(upper_loss=None, lower_loss=lambda x, y, b: y.sum())  # type: ignore[arg-type]
    detached = methods.BilevelProblem(lambda x, y, _: 1.0, lambda x, y, _: y.sum())  # type: ignore[arg-type,return-value]
    with pytest.raises(ClosureError, match="upper_loss returned"):
        next(methods.run("soba", detached, torch.ones(2), torch.ones(2), iterations=1))


@pytest.mark.filterwarnings("ignore:.*sufficient decrease", "ignore:.*slope", "ignore:.*did not bring")
@pytest.mark.parametrize("name", methods.names())
def test_an_exception_leaves_the_run_where_it_was(name: str) -> None:
    """At any call of a loss in the third iteration; the run then goes on as if nothing had happened."""
    problem, x, y = stochastic()
    calls, at = 0, -1

    def lower(*arguments: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls - 1 == at:
            raise KeyboardInterrupt
        return problem.lower_loss(*arguments)

    fragile = methods.BilevelProblem(upper_loss=problem.upper_loss, lower_loss=lower)
    options = dict(OPTIONS.get(name, {}))
    options |= {"lower_steps": 3, "auxiliary_steps": 3} if name == "d-tfbo" else {"lower_steps": 3}
    batches = methods.Minibatches(data(), data(), size=12, blocks=options.pop("batches", None) == "blocks", seed=5)
    stream = methods.run(name, fragile, x, y, iterations=6, batches=batches, **options)
    for _ in range(2):
        next(stream)
    before = stream.state_dict()
    one = plain(next(stream).x)
    stream.load_state_dict(before)
    at = calls + (name not in ("soba", "saba", "s-tfbo"))  # these evaluate g once in an iteration
    with pytest.raises(KeyboardInterrupt):
        next(stream)
    assert repr(plain(stream.state_dict())) == repr(plain(before))
    assert plain(next(stream).x) == one


def test_compare_and_budget() -> None:
    entries: dict[str, Any] = {"a": "ba", "b": ("ba", {"upper_step": 0.2}), "c": "soba"}
    problem, x, y = stochastic()
    batches = methods.Minibatches(data(), data(), size=12)
    runs = methods.compare(entries, problem, x, y, iterations=100, batches=batches, budget=60.0, seed=3)
    assert list(runs) == ["a", "b", "c"]
    for label, records in runs.items():
        assert records[-1].total_cost >= 60.0 > records[-2].total_cost, label
    assert runs["a"][0].losses == runs["b"][0].losses  # the same stream
    alone = list(methods.run("ba", problem, x, y, iterations=100, batches=batches, budget=60.0, seed=3))
    assert torch.equal(alone[-1].x, runs["a"][-1].x)
    assert set(methods.compare(["ba", "soba"], problem_of(b2()), b2().x0, b2().y0, iterations=1)) == {"ba", "soba"}
    with pytest.raises(OptionError, match="budget"):
        run("soba", b2(), 2, budget=0.0)


@pytest.mark.filterwarnings("ignore:.*sufficient decrease", "ignore:.*slope", "ignore:.*descend")
@pytest.mark.parametrize("name", methods.names())
def test_losses_that_do_not_use_all_they_are_given(name: str) -> None:
    """No mixed derivative; f without x; a part of y that f does not use: zeros, no error."""
    problem = methods.BilevelProblem(
        upper_loss=lambda x, y, _: (y["a"] - 1).square().sum(),
        lower_loss=lambda x, y, _: (y["a"] - 2).square().sum() + y["b"].square().sum(),
    )
    y = {"a": torch.zeros(2), "b": torch.ones(1)}
    *_, record = methods.run(name, problem, torch.ones(2), y, iterations=2)
    assert torch.equal(record.x, torch.ones(2)) or name == "hozog"
    assert bool(record.y["a"].isfinite().all())
