"""hypertorch itself (module ``hypergrad``), where it is installed. It is not on PyPI, and not in `make test-hosts`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from adaptive_bilevel import BiSLS
from tests.hosts.test_functional_loops import gd_map, hyper, params_of_zeros, train_loss, val_loss

hg: Any = pytest.importorskip("hypergrad")
if not hasattr(hg, "CG_normaleq"):
    pytest.skip("another package of this name", allow_module_level=True)


def hypergradients(name: str, history: Any, hparams: Any) -> Any:
    """Set .grad of the hyperparameters by one of its functions."""
    if name == "reverse":
        return hg.reverse(history[-11:], hparams, [gd_map] * 10, val_loss)
    if name == "reverse_unroll":
        return hg.reverse_unroll(history[-1], hparams, val_loss)
    fp_map = hg.GradientDescent(train_loss, 1.0) if name in ("CG", "CG_normaleq") else gd_map
    options = {"set_grad": True} | ({"stochastic": False} if name == "CG" else {})
    return getattr(hg, name)(history[-1], hparams, 20, fp_map, val_loss, **options)


NAMES = ["CG", "CG_normaleq", "fixed_point", "reverse", "reverse_unroll"]


def trained(name: str, searched: bool) -> float:
    hparams = hyper()
    outer: Any = BiSLS(hparams, direction="adam") if searched else torch.optim.Adam(hparams, lr=0.1)
    for _ in range(40):
        history = [[p.requires_grad_() for p in params_of_zeros()]]
        for _ in range(20):
            history.append(gd_map(history[-1], hparams))
        outer.zero_grad()
        hypergradients(name, history, hparams)
        if searched:
            outer.step(lambda y: val_loss(y, hparams), lower=(history[-1], lambda y: train_loss(y, hparams)))
        else:
            outer.step()
    return float(val_loss(history[-1], hparams))


@pytest.mark.filterwarnings("ignore:Converting a tensor")  # theirs
@pytest.mark.filterwarnings("ignore:BiSLS. for 20 steps")  # truncated hypergradients, at the solution
@pytest.mark.parametrize("name", NAMES)
def test_its_functions_give_the_hypergradient(name: str) -> None:
    assert trained(name, True) <= 1.001 * trained(name, False)
