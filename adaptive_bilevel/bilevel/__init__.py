"""The upper level of a bilevel problem: `BiSLS`, `BiSPS`, and the search of the papers, `OneStepBiSLS`.

An upper search is a composition of roles, called in this order:

```python
point = evaluate(upper)                       # f, f_x, f_y, and h from .grad
path  = direction(point.h)                    # x - a d, cut by the convex set if there is one
model = response(path, point)                 # y + a w, slope s
found = search(policy, path, model, check)    # unless the pace gives a step
taken = momentum(path, found)
prediction(lower, model, taken)               # where the next lower loop begins
```

| role | question | option | implementations |
|---|---|---|---|
| Direction | along which direction? | ``direction`` | `Plain`, `AdamMetric` |
| Response | how does y respond? | ``response`` | `Tangent`; `OneMoreStep` in `OneStepBiSLS` |
| ModelCheck | how far does the model hold? | ``curvature`` | `CurvatureCheck`, `NoCheck` |
| Pace | search in this step? | ``pace`` | `AsLengthsAgree`, `EveryStep` |
| Momentum | which direction does the step take? | ``momentum`` | `Predictive`, `Full`, `Certified` |
| Prediction | does y move with x? | ``carry`` | `BestShare`, `Always`, `Never` |
| Diagnosis | what limits this run? | attribute ``diagnosis`` | `SlopeDiagnosis` |

**Your own role** is a class with three methods. ``init()`` returns the state before the first step, ``propose(context,
state)`` the answer, and ``commit(context, answer, state)`` the changes of the state after the step. Pass an instance to
the option. `roles` has the protocols. The state is a `RoleState` of plain numbers and tensors, which ``state_dict``
saves. This example is a heavy ball with a fixed weight, in place of the mean of hypergradients:

>>> import torch
>>> from adaptive_bilevel import BiSLS
>>> from adaptive_bilevel.bilevel import Mix, RoleState
>>> class HeavyBall:
...     def __init__(self, weight):
...         self.weight = weight
...     def init(self):
...         return RoleState()
...     def propose(self, context, state):
...         balls = [
...             h if "ball" not in own else h + self.weight * own["ball"]
...             for h, own in zip(context.gradient.values, state.each)
...         ]
...         return Mix(lambda: context.descent.precondition(balls), memory=balls)
...     def commit(self, context, mix, state):
...         return RoleState(each=[{"ball": ball.clone()} for ball in mix.memory])
>>> x = torch.tensor([3.0], requires_grad=True)
>>> outer = BiSLS([x], momentum=HeavyBall(0.5))
>>> for _ in range(20):
...     x.grad = 2 * x.detach()
...     _ = outer.step(lambda: (x**2).sum())
>>> bool(abs(x) < 1e-3)
True

For hosts: pass a `Lower` as ``lower=`` if the lower variables are not in torch optimizers. Pass an
`adaptive_bilevel.evaluation.Objective` as the closure if the host evaluates the upper loss. `UpperSearch`,
`OneStepSearch` and `UpperPolyak` are base classes for optimizers of the host's own class; they have the steps, but no
constructor.
"""

from ..optim.direction import Descent, Direction, Gradient
from ..optim.state import RoleState
from .advice import diagnose
from .bisls import BiSLS, UpperSearch
from .bisps import BiSPS, UpperPolyak
from .context import Change, Mix, MomentumContext, PaceContext, Point, PredictionContext, Taken
from .functional import FunctionalLower
from .lower import Lower, LowerLevel, LowerProblem
from .monitoring import monitor
from .one_step import OneStepBiSLS, OneStepSearch
from .plotting import plot
from .response import Tangent, Unanswered
from .roles import Diagnosis, ModelCheck, Momentum, Pace, Prediction, Response, ResponseModel, StepCheck

__all__ = [
    "BiSLS",
    "BiSPS",
    "Change",
    "Descent",
    "Diagnosis",
    "Direction",
    "FunctionalLower",
    "Gradient",
    "Lower",
    "LowerLevel",
    "LowerProblem",
    "Mix",
    "ModelCheck",
    "Momentum",
    "MomentumContext",
    "OneStepBiSLS",
    "OneStepSearch",
    "Pace",
    "PaceContext",
    "Point",
    "Prediction",
    "PredictionContext",
    "Response",
    "ResponseModel",
    "RoleState",
    "StepCheck",
    "Taken",
    "Tangent",
    "Unanswered",
    "UpperPolyak",
    "UpperSearch",
    "diagnose",
    "monitor",
    "plot",
]
