"""Polyak steps as the learning rate of TorchOpt's optimizers, whose updates do not receive the loss."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim.optimizer import StateDict

from adaptive_bilevel import policies
from adaptive_bilevel.errors import LowerLevelError, NonFiniteError
from adaptive_bilevel.policies import Context, Outcome, Record

from ._host import Tree
from .transform import AnyPolicy, check_policy, without_graphs
from .trees import slope_along

__all__ = ["PolyakLR"]


class PolyakLR:
    """A callable learning rate. `tell` gives it the loss and the gradients before each update.

    TorchOpt calls a callable ``lr`` once per tensor; all calls of one update return the same step.

    Args:
        policy: `SPSMax`, `DecSPS`, `SPSB`, `Envelope` (or a search, with ``tell(trial=...)``) of
            ``adaptive_bilevel.policies``.
        differentiable: Whether an unrolled loop differentiates the step; by default, the step is a constant. If True,
            call `stop_gradient` where the graph of the loop ends, next to ``torchopt.stop_gradient(optimizer)``.

    Attributes:
        record: The last step's record; None before.

    Raises:
        OptionError: Not a policy, or a search that is to be differentiated.

    >>> import torchopt
    >>> lr = PolyakLR(policies.SPSMax())
    >>> x = torch.tensor([3.0, 2.0], requires_grad=True)
    >>> optimizer = torchopt.SGD([x], lr=lr)
    >>> loss = (x**2).sum() / 2
    >>> loss.backward()
    >>> lr.tell(loss, [x.grad])
    >>> _ = optimizer.step()
    >>> x.tolist()
    [1.5, 1.0]
    """

    def __init__(self, policy: AnyPolicy | None = None, *, differentiable: bool = False) -> None:
        self.policy: AnyPolicy = policies.SPSB() if policy is None else policy
        check_policy("PolyakLR", self.policy, differentiable)
        self._differentiable = differentiable
        self._state = self.policy.init()
        self._step: Tensor | float | None = None
        self._count: int | None = None
        self.record: Record | None = None

    def tell(
        self,
        loss: Tensor | float,
        grads: Tree,
        directions: Tree = None,
        *,
        trial: Callable[[float], float] | None = None,
    ) -> None:
        """Compute the step of the next update. On an accelerator, this waits for the device.

        Args:
            loss: The loss.
            grads: Its gradients, a tree of tensors; None leaves are ignored.
            directions: d, if the optimizer does not step along the gradients. The slope is then <grads, d>. For
                ``torchopt.adam`` and similar ones, d is minus the result of ``update`` at learning rate 1.
            trial: For a search, step -> loss after that step.

        Raises:
            TensorError: Gradients and directions do not fit.
            NonFiniteError: Loss or slope are not finite. TorchOpt multiplies the gradients, and 0 times NaN is NaN, so
                no step could keep the parameters where they are: skip this update.
        """
        value = torch.as_tensor(loss)
        slope = slope_along("PolyakLR.tell", grads, grads if directions is None else directions)
        if not self._differentiable:
            value, slope = value.detach(), slope.detach()
        record, state = self.policy.propose(self._state, Context(value, slope, trial))
        if record.outcome == Outcome.non_finite:
            raise NonFiniteError(
                f"PolyakLR.tell(loss={float(value.detach())}): the loss, or the slope {float(slope.detach())} of grads "
                "and directions, is not finite. Even a step of 0 times such gradients is NaN in TorchOpt, so skip this "
                "update: catch this error, and do not call the optimizer's step(). Nothing was changed"
            )
        self._state = state
        self._step, self._count = record.step_size, None
        self.record = without_graphs(record)

    def __call__(self, count: Tensor | float) -> Tensor | float:
        """Return the step: TorchOpt calls this for each tensor of an update.

        Raises:
            LowerLevelError: `tell` was not called since the last update.
        """
        number = int(count)
        if self._step is None or (self._count is not None and number != self._count):
            raise LowerLevelError(
                f"PolyakLR: update {number} was not told its loss; call lr.tell(loss, grads) before each update"
            )
        self._count = number
        return self._step

    def stop_gradient(self) -> None:
        """Detach the state from the graph between unrolled loops, as ``torchopt.stop_gradient`` does."""
        self.load_state_dict(self.state_dict())

    def state_dict(self) -> StateDict:
        """Return the policy's state: numbers and tensors."""
        return {name: v.detach().clone() if isinstance(v, Tensor) else v for name, v in self._state._asdict().items()}

    def load_state_dict(self, state: StateDict) -> None:
        """Load it."""
        self._state = type(self._state)(**state)
