"""The closed-form rules inside vmap, jit, scan and torch.compile: the same numbers, no branch on a traced value.

Python's `if`, `float` and `bool` on a traced value raise there, so that these tests also show that nothing waits for a
device.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from adaptive_bilevel.policies import SPSB, Constant, DecSPS, Envelope, GradientNorm, Policy, SPSMax

RULES: dict[str, Policy[Any]] = {
    "constant": Constant(bound=0.3, decay="inverse_sqrt"),
    "spsmax": SPSMax(bound=0.4, c=0.5),
    "spsmax_found": SPSMax(),
    "decsps": DecSPS(bound=0.4),
    "decsps_found": DecSPS(),
    "spsb": SPSB(bound=0.4),
    "spsb_found": SPSB(decay="inverse"),
    "spsb_callable": SPSB(bound=0.4, decay=lambda k: 0.5**k, c=lambda k: 1.0 + k),
    "envelope": Envelope(bound=0.4, decay="inverse", floor=0.1, floor_decay="inverse_sqrt"),
    "gradient_norm": GradientNorm(),
    "gradient_norm_max": GradientNorm(initial=2.0, coupling="max"),
}

# Ordinary samples among every kind that may not move: (loss, slope).
STREAM = [
    (6.0, 20.0),
    (math.nan, 3.0),
    (23.14, 185.0),
    (1.0, 0.0),
    (-1.0, 2.0),
    (0.0, 2.0),
    (0.7, 2.8),
    (2.0, math.inf),
    (math.inf, math.inf),
    (-math.inf, 1.0),
    (2.0, -1.0),
    (1e-9, 1e-30),
    (1e200, 1e-200),
    (5.0, 9.0),
]


def numbers(fields: Any) -> list[float]:
    return [float(value) for value in fields]


def on_floats(policy: Policy[Any]) -> tuple[list[list[float]], list[list[float]]]:
    """Records and states of the stream."""
    state, records, states = policy.init(), [], []
    for loss, slope in STREAM:
        record, state = policy.step(state, loss=loss, slope=slope)
        records.append(numbers(record))
        states.append(numbers(state))
    return records, states


def same(left: Any, right: Any) -> None:
    np.testing.assert_allclose(np.asarray(left, dtype=float), np.asarray(right, dtype=float), rtol=1e-13, atol=0.0)


@pytest.fixture
def jax() -> Iterator[Any]:
    found = pytest.importorskip("jax")
    before = found.config.jax_enable_x64
    found.config.update("jax_enable_x64", True)
    yield found
    found.config.update("jax_enable_x64", before)


@pytest.fixture
def torch() -> Any:
    found = pytest.importorskip("torch")
    found.set_default_dtype(found.float32)  # must not matter; the fixture `reproducible` takes it back
    return found


def stream(xp: Any) -> tuple[Any, Any]:
    losses, slopes = zip(*STREAM, strict=True)
    return xp.asarray(losses, dtype=xp.float64), xp.asarray(slopes, dtype=xp.float64)


def first_steps(policy: Policy[Any]) -> tuple[list[list[float]], list[list[float]]]:
    """Records and states of each sample of the stream as the first one."""
    pairs = [policy.step(policy.init(), loss=loss, slope=slope) for loss, slope in STREAM]
    return [numbers(record) for record, _ in pairs], [numbers(state) for _, state in pairs]


@pytest.mark.parametrize("name", RULES)
def test_eager_torch_stream(name: str, torch: Any) -> None:
    policy = RULES[name]
    records, states = on_floats(policy)
    state = policy.init()
    for k, (loss, slope) in enumerate(zip(*stream(torch), strict=True)):
        record, state = policy.step(state, loss=loss, slope=slope)
        assert all(isinstance(value, torch.Tensor) for value in (*record, *state))
        same(numbers(record), records[k])
        same(numbers(state), states[k])


@pytest.mark.parametrize("name", RULES)
def test_eager_numpy_stream(name: str) -> None:
    """Without a NumPy warning too: warnings are errors here."""
    policy = RULES[name]
    records, states = on_floats(policy)
    for convert in (np.float64, np.asarray):
        state = policy.init()
        for k, (loss, slope) in enumerate(STREAM):
            record, state = policy.step(state, loss=convert(loss), slope=convert(slope))
            same(numbers(record), records[k])
            same(numbers(state), states[k])


@pytest.mark.parametrize("name", RULES)
def test_torch_vmap(name: str, torch: Any) -> None:
    policy = RULES[name]

    def first(loss: Any, slope: Any) -> Any:
        return policy.step(policy.init(), loss=loss, slope=slope)

    def second(state: Any, loss: Any, slope: Any) -> Any:
        return policy.step(state, loss=loss, slope=slope)

    records, states = first_steps(policy)
    losses, slopes = stream(torch)
    record, state = torch.func.vmap(first)(losses, slopes)
    same(torch.stack([value.double() for value in record], 1), records)
    same(torch.stack([value.double() for value in state], 1), states)
    record, state = torch.func.vmap(second)(state, losses.flip(0), slopes.flip(0))
    expected = [
        policy.step(policy.step(policy.init(), loss=a, slope=b)[1], loss=c, slope=d)[0].step_size
        for (a, b), (c, d) in zip(STREAM, reversed(STREAM), strict=True)
    ]
    same(record.step_size, expected)


def test_torch_compile_without_a_graph_break(torch: Any) -> None:
    """In one graph, to compile once."""
    names = ("constant", "decsps_found", "spsb_callable", "gradient_norm_max")
    policies = [RULES[name] for name in names]

    def run(losses: Any, slopes: Any) -> Any:
        results = []
        for policy in policies:
            state = policy.init()
            for k in range(2):
                record, state = policy.step(state, loss=losses[k], slope=slopes[k])
                results.append((tuple(record), tuple(state)))
        return results

    compiled = torch.compile(run, backend="eager", fullgraph=True)
    results = iter(compiled(*stream(torch)))
    for policy in policies:
        for record, state in list(zip(*on_floats(policy), strict=True))[:2]:
            traced_record, traced_state = next(results)
            same(numbers(traced_record), record)
            same(numbers(traced_state), state)


@pytest.mark.parametrize("name", RULES)
def test_jax_jit_and_vmap(name: str, jax: Any) -> None:
    policy = RULES[name]
    records, states = first_steps(policy)

    def first(loss: Any, slope: Any) -> Any:
        return policy.step(policy.init(), loss=loss, slope=slope)

    record, state = jax.jit(jax.vmap(first))(*stream(jax.numpy))
    same(np.stack(record, 1), records)
    same(np.stack(state, 1), states)


@pytest.mark.parametrize("name", RULES)
def test_jax_scan(name: str, jax: Any) -> None:
    """The state keeps its types, as a loop of JAX demands."""
    policy = RULES[name]
    records, states = on_floats(policy)

    def body(state: Any, sample: Any) -> Any:
        record, state = policy.step(state, loss=sample[0], slope=sample[1])
        return state, (record, state)

    _, (record, state) = jax.lax.scan(body, policy.init(), stream(jax.numpy))
    same(np.stack(record, 1), records)
    same(np.stack(state, 1), states)


def test_jax_gradient_through_a_step(jax: Any) -> None:
    """A step size is differentiable where it is smooth, as meta-learning through the lower steps needs."""
    policy = SPSMax(bound=10.0)
    derivative = jax.grad(lambda loss: policy.step(policy.init(), loss=loss, slope=4.0 * loss / loss)[0].step_size)
    assert float(derivative(2.0)) == pytest.approx(0.25)


@pytest.mark.parametrize("name", [*RULES, "spsb_estimated"])
@pytest.mark.parametrize(
    "stream",
    [
        [(0.5, 1.0)] * 3,
        [(0.0, 0.0), (0.3, 1.0)],
        [(0.5, 1.0), (0.0, 0.0), (0.3, 1.0)],
    ],
)
def test_torch_gradient_through_steps(name: str, stream: list[tuple[float, float]], torch: Any) -> None:
    """Losses without variance and solved problems have no effect at first order, not NaN."""
    policy, inputs = {**RULES, "spsb_estimated": SPSB()}[name], []
    state = policy.init()
    for loss, slope in stream:
        inputs += [torch.tensor(number, dtype=torch.float64, requires_grad=True) for number in (loss, slope)]
        record, state = policy.step(state, loss=inputs[-2], slope=inputs[-1])
        if record.step_size.requires_grad:
            found = torch.autograd.grad(record.step_size, inputs, allow_unused=True, retain_graph=True)
            assert all(g is None or torch.isfinite(g) for g in found)


def test_torch_keeps_the_dtype_of_the_sample(torch: Any) -> None:
    for dtype in (torch.float32, torch.float64):
        for policy in RULES.values():
            state = policy.init()
            for _ in range(2):
                record, state = policy.step(
                    state, loss=torch.tensor(6.0, dtype=dtype), slope=torch.tensor(20.0, dtype=dtype)
                )
                assert record.step_size.dtype == record.bound.dtype == record.proposed.dtype == dtype


def test_shared_states_and_raw_values_may_be_traced(torch: Any, jax: Any) -> None:
    envelope, norm = Envelope(bound=1.0, floor=0.1), GradientNorm(coupling="product")

    def both(raw: Any, slope: Any) -> Any:
        _, other = GradientNorm().step(GradientNorm().init(), loss=0.0 * slope, slope=slope)
        coupled, _ = norm.step(norm.init(), loss=0.0 * slope, slope=slope, shared=[other])
        return envelope.step(envelope.init(), loss=slope, slope=slope, raw=raw)[0].step_size, coupled.step_size

    raws, slopes = [0.01, 0.5, 3.0], [1.0, 3.0, 8.0]
    expected = ([0.1, 0.5, 1.0], [1 / 2, 1 / 4, 1 / 9])
    same(jax.jit(jax.vmap(both))(jax.numpy.asarray(raws), jax.numpy.asarray(slopes)), expected)
    results = torch.func.vmap(both)(torch.tensor(raws).double(), torch.tensor(slopes).double())
    same(torch.stack(results), expected)
