"""Automatic step sizes for the problems of Betty's engine (betty-ml 0.2.1 and 0.1.1).

```python
from adaptive_bilevel_betty import BiSLS, SLS, bind

class Parent(ImplicitProblem):
    def configure_optimizer(self):
        # was: torch.optim.SGD(self.module.parameters(), lr=1, momentum=0.9)
        return BiSLS(self.module.parameters(), direction="adam")

class Child(ImplicitProblem):
    def configure_optimizer(self):
        return SLS(self.module.parameters())  # was: torch.optim.SGD(self.module.parameters(), lr=0.1)

engine = Engine(...)
bind(engine)
```

Problems, configs and the engine stay as they are. ``Config(type="adaptive_cg")`` gives right hypergradients on top.
`OneStepBiSLS` is the paper's own upper search.
"""

from .bilevel import BiSLS, BiSPS, OneStepBiSLS
from .binding import AdaptiveEngine, bind
from .hypergradient import adaptive_cg
from .optimizers import SLS, SLSB, SPSB, AutoSLS, DecSPS, SPSMax

__all__ = [
    "SLS",
    "SLSB",
    "SPSB",
    "AdaptiveEngine",
    "AutoSLS",
    "BiSLS",
    "BiSPS",
    "DecSPS",
    "OneStepBiSLS",
    "SPSMax",
    "adaptive_cg",
    "bind",
]
