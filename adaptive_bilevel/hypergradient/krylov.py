"""An orthonormal basis of a Krylov space: vectors of several tensors as flat ones, the rows of one matrix.

So a projection on many of them is two products with that matrix.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from ..evaluation.parts import Spread, form, formed, part, spread
from ..evaluation.vectors import Vector, widen
from .solution import MatVec

__all__ = ["Flat", "Layout", "Rows", "on_host"]

Flat = list[Tensor]
"""A vector: one 1-dimensional tensor for each device and dtype (and way to be in parts), in at least float32."""


@final
class Layout:
    """Where the tensors of a vector lie in its flat form.

    Args:
        like: Tensors with the shapes, dtypes and devices of the vector. Of those in parts, the flat form has the
            entries that this process holds.

    Attributes:
        blocks: Number of entries here, device and dtype of each tensor of the flat form.
        size: Number of entries.
    """

    def __init__(self, like: Sequence[Tensor]) -> None:
        self._forms = [(t.shape, t.dtype) for t in like]
        self._parts = [(part(t).shape, form(t)) for t in like]
        wide = widen(like)
        self._wide = [t.dtype for t in wide]
        groups: dict[tuple[torch.device, torch.dtype, Spread | None], list[int]] = {}
        for i, t in enumerate(wide):
            groups.setdefault((t.device, t.dtype, spread(t)), []).append(i)
        self._members = [(members, [part(wide[i]).numel() for i in members]) for members in groups.values()]
        keys = [key[:2] for key in groups]
        self.blocks = [(sum(sizes), *key) for key, (_, sizes) in zip(keys, self._members, strict=True)]
        self._spreads = [over for _, _, over in groups]
        self.size = sum(t.numel() for t in like)

    def fits(self, tensors: Sequence[Tensor]) -> bool:
        """Return whether the tensors have the shapes and dtypes of the vector, in this order."""
        return [(t.shape, t.dtype) for t in tensors] == self._forms

    def flat(self, tensors: Sequence[Tensor]) -> Flat:
        """Return the flat form, which may share memory with ``tensors``."""
        parts = [part(t).detach().to(wide).reshape(-1) for t, wide in zip(tensors, self._wide, strict=True)]
        return [
            parts[members[0]] if len(members) == 1 else torch.cat([parts[i] for i in members])
            for members, _ in self._members
        ]

    def shaped(self, flat: Flat) -> Vector:
        """Return the tensors of a flat form, which may share memory with it."""
        found: dict[int, Tensor] = {}
        for block, (members, sizes) in zip(flat, self._members, strict=True):
            found.update(zip(members, block.split(sizes), strict=True))
        own = zip(self._forms, self._parts, strict=True)
        return tuple(formed(found[i].view(shape).to(dtype), made) for i, ((_, dtype), (shape, made)) in enumerate(own))

    def total(self, sums: Sequence[Tensor]) -> Tensor:
        """Return sums over a vector, from those over each block of it, on the device of the first block."""
        whole = [s if over is None else over.total(s) for s, over in zip(sums, self._spreads, strict=True)]
        return whole[0] if len(whole) == 1 else torch.stack([s.to(whole[0]) for s in whole]).sum(0)

    def dot(self, left: Flat, right: Flat) -> Tensor:
        """Return <left, right>."""
        return self.total([torch.dot(a, b) for a, b in zip(left, right, strict=True)])

    def square(self, flat: Flat) -> Tensor:
        """Return <flat, flat>."""
        return self.dot(flat, flat)


@final
class Rows:
    """Orthonormal flat vectors, the rows of one matrix for each device and dtype.

    Args:
        layout: Of the vectors.
        most: Most rows. There is room for one more, which may be appended and dropped.
        dtype: What the rows are stored in; None: as they are. They are used as they were stored.
        device: Where they are stored, and projected on; None: where the vectors are. Vectors come and go, one at a
            time.
        stored: Matrices of rows that were stored before (`stored`), in place of empty ones.
    """

    def __init__(
        self,
        layout: Layout,
        most: int,
        dtype: torch.dtype | None,
        device: str | torch.device | None = None,
        stored: Sequence[Tensor] | None = None,
    ) -> None:
        self._layout = layout
        self._kept = list(stored) if stored is not None else self._empty(layout, most, dtype, device)
        self._wide = [own for _, _, own in layout.blocks]
        self.unit = max(torch.finfo(kept.dtype).eps for kept in self._kept)
        self._home = layout.blocks[0][1]
        self.most, self.count = most, 0 if stored is None else most

    @staticmethod
    def _empty(layout: Layout, most: int, dtype: torch.dtype | None, device: str | torch.device | None) -> list[Tensor]:
        return [torch.empty(most + 1, n, device=device or at, dtype=dtype or own) for n, at, own in layout.blocks]

    def stored(self, dropped: bool) -> list[Tensor]:
        """Return the matrices, one for each device and dtype; ``dropped``: with the row that was dropped last."""
        return [kept[: self.count + dropped] for kept in self._kept]

    def append(self, row: Flat) -> Flat:
        """Store a row, and return it as it was stored."""
        for kept, block in zip(self._kept, row, strict=True):
            kept[self.count].copy_(block)
        self.count += 1
        return self.row(self.count - 1)

    def grow(self, matvec: MatVec, following: Flat, length: float, unit: float) -> tuple[list[list[float]], int, bool]:
        """Append rows by Lanczos' method until there are `most`, or the Krylov space is exhausted.

        Args:
            matvec: The product with H.
            following: The first row times its length; finite.
            length: Its length.
            unit: What counts as rounding, relative to the norm of H.

        Returns:
            The columns of V^T H V, each with the norm of what H v_j has outside of V below it, 0 in an exhausted space;
            the number of products; and whether all of them were finite. One that is not ends the basis before it.
        """
        columns: list[list[float]] = []
        products, scale = 0, 0.0
        while self.count < self.most:
            vector = self.append([block / length for block in following])
            inside, following = self.outside(self._layout.flat(matvec(self._layout.shaped(vector))), self.count - 2)
            products += 1
            column: list[float] = torch.cat([inside, self._layout.square(following).to(inside).reshape(1)]).tolist()
            if not all(map(math.isfinite, column)):
                self.drop()
                return columns, products, False
            length = column[-1] = math.sqrt(column[-1])
            scale = max(scale, math.hypot(*column))
            columns.append(column)
            if length <= unit * scale or self.count == self._layout.size:
                column[-1] = 0.0  # the Krylov space is exhausted
                break
        if columns and columns[-1][-1] > 0.0:
            self.append([block / length for block in following])  # H V = V T + below v_{k+1} e_k^T
            self.drop()
        return columns, products, True

    def drop(self) -> None:
        """Drop the last row."""
        self.count -= 1

    def row(self, index: int) -> Flat:
        """Return a row as it was stored; the one at ``count`` is the one that was dropped."""
        return [kept[index].to(at, wide) for kept, (_, at, wide) in zip(self._kept, self._layout.blocks, strict=True)]

    def dots(self, flat: Flat, start: int = 0) -> Tensor:
        """Return the inner products with the rows from ``start`` on."""
        return self._dots(self._there(flat), start)

    def combine(self, coefficients: Tensor) -> Flat:
        """Return the combination of all rows with these coefficients."""
        return self._back(self._add([None] * len(self._kept), coefficients))

    def outside(self, flat: Flat, start: int = 0) -> tuple[Tensor, Flat]:
        """Return the coefficients of the projection on the rows, and what is left, orthogonal to them.

        Projected twice, which is enough for orthogonality to rounding (Giraud et al., 2005).

        Args:
            flat: The vector.
            start: The first projection is on the rows from here on; for a product of a symmetric matrix with the last
                row, which is orthogonal to all rows but the last two, these are enough.
        """
        if self.count == 0:
            return torch.zeros(0, dtype=flat[0].dtype, device=self._home), flat
        exact = all(kept.dtype == wide for kept, wide in zip(self._kept, self._wide, strict=True))
        start = max(start, 0) if exact else 0  # rows that were rounded are not orthogonal enough for less
        flat = self._there(flat)
        first = self._dots(flat, start)
        rest = self._add(flat, -first, start)
        second = self._dots(rest)
        coefficients = second.clone()
        coefficients.narrow(0, start, len(first)).add_(first)
        return coefficients, self._back(self._add(rest, -second))

    def _there(self, flat: Flat) -> Flat:
        """Return a vector where the rows are stored."""
        return [block.to(kept.device) for block, kept in zip(flat, self._kept, strict=True)]

    def _back(self, flat: Flat) -> Flat:
        """Return a vector where it belongs."""
        return [block.to(at) for block, (_, at, _) in zip(flat, self._layout.blocks, strict=True)]

    def _dots(self, flat: Flat, start: int = 0) -> Tensor:
        sums = []
        for kept, block in zip(self._kept, flat, strict=True):
            rows = kept[start : self.count]
            if kept.dtype == block.dtype:
                sums.append(rows @ block)
            else:  # one row at a time is raised, so that the memory saved is not taken again
                sums.append(torch.stack([torch.dot(row.to(block.dtype), block) for row in rows]))
        return self._layout.total(self._back(sums))

    def _add(self, to: Sequence[Tensor | None], coefficients: Tensor, start: int = 0) -> Flat:
        result = []
        for kept, wide, block in zip(self._kept, self._wide, to, strict=True):
            rows, weights = kept[start : self.count], coefficients.to(device=kept.device, dtype=wide)
            if kept.dtype == wide:
                result.append(weights @ rows if block is None else torch.addmv(block, rows.T, weights))
                continue
            total = kept.new_zeros(kept.shape[1], dtype=wide) if block is None else block.clone()
            for row, weight in zip(rows, weights, strict=True):
                total.add_(row.to(wide) * weight)
            result.append(total)
        return result


def on_host(coefficients: Tensor) -> Tensor:
    """Return coefficients of rows in double precision on the host; waits for the device."""
    return coefficients.to(device="cpu", dtype=torch.float64)
