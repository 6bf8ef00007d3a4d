"""Evaluating the user's losses without leaving a trace, and the arithmetic on what they return.

* `guard`: one step's evaluations; parameters, buffers, random state and ``.grad`` come back exactly.
* `closures`: how a closure may be written, and what it says of its loss.
* `attempts`: trials that cannot be computed.
* `interception`: what stands between closures and torch while they run.
* `buffers`: the buffers of the modules that a closure runs.
* `counts`: the number of oracle calls.
* `reductions`: from tensors to scalars, over all tensors of a level and over all processes.
* `tensors`, `vectors`, `foreach`: lists of tensors as one vector, and their arithmetic.
* `processes`, `parts`: several processes, each with a copy of all parameters, or with a part of each.
* `causes`: an error of one process, told to the others.
"""

from .counts import Counts, Evaluations
from .objective import Evaluated, Objective, Replay

__all__ = ["Counts", "Evaluated", "Evaluations", "Objective", "Replay"]
