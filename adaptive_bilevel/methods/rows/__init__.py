"""The algorithms of the literature, each as one `Row`, by families; step sizes are placeholders: give those of yours.

Exponents of decaying steps are those of the papers. Where a paper's pseudocode is misprinted, the row is what its
analysis uses (`Row.correction` and `Row.order` give the printed variants).
"""

from __future__ import annotations

from ..row import Row
from .adaptive import ROWS as ADAPTIVE
from .amortised import ROWS as AMORTISED
from .derivative_free import ROWS as DERIVATIVE_FREE
from .implicit import ROWS as IMPLICIT
from .unrolled import ROWS as UNROLLED
from .value_function import ROWS as VALUE_FUNCTION
from .variance_reduced import ROWS as VARIANCE_REDUCED

__all__ = ["FAMILIES", "ROWS"]

FAMILIES = (IMPLICIT, VARIANCE_REDUCED, AMORTISED, DERIVATIVE_FREE, UNROLLED, ADAPTIVE, VALUE_FUNCTION)
ROWS: dict[str, Row] = {row.name: row for family in FAMILIES for row in family}
