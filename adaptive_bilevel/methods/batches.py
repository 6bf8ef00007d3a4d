"""Sources of batches: minibatches of tensors in memory, pairs of DataLoaders, or any iterable of pairs."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import OptionError
from ..hypergradient.sample import Batch
from ..hypergradient.trees import Tree, flatten, same_structure
from ..policies import validation

__all__ = ["Loaders", "Minibatches", "Pair", "Source"]


class Pair(NamedTuple):
    """One batch of each level.

    Attributes:
        upper: Batch of the upper loss.
        lower: Batch of the lower loss.
        upper_id: Index of the upper batch in a fixed partition, or None if it is not known. SAGA needs it.
        lower_id: Index of the lower batch, likewise.

    >>> Pair(upper="images", lower="labels").lower
    'labels'
    """

    upper: Batch = None
    lower: Batch = None
    upper_id: Hashable = None
    lower_id: Hashable = None


class Minibatches:
    """An endless stream of minibatches of tensors in memory. A run saves the position in the stream.

    Args:
        upper: The upper level's data: a tensor, or a nesting of tensors with one first dimension, e.g. (images,
            labels).
        lower: The lower level's data, likewise.
        size: Batch size, of both levels or (upper, lower).
        blocks: If False, indices are drawn with replacement. If True, the data are shuffled and cut into blocks once,
            and each batch is a random block. SAGA and SARAH (`saba`, `srba`) need such a finite sum.
        seed: Seed of the draws.

    Attributes:
        full: The pair of all data.

    Raises:
        OptionError: A size is out of range, or tensors of one level differ in their first dimension.

    >>> data = torch.arange(6.0), torch.arange(6.0)
    >>> batches = Minibatches(data, data, size=(2, 3))
    >>> pair = next(iter(batches))
    >>> pair.upper[0].shape, pair.lower[1].shape
    (torch.Size([2]), torch.Size([3]))
    """

    def __init__(
        self, upper: Tree, lower: Tree, *, size: int | tuple[int, int], blocks: bool = False, seed: int = 0
    ) -> None:
        sizes = size if isinstance(size, tuple) else (size, size)
        if len(sizes) != 2:
            raise OptionError(f"Minibatches(size={size!r}): size must be a number, or (upper, lower)")
        for one in sizes:
            validation.count("Minibatches", "size", one)
        self._upper, self._lower = _Level(upper, "upper", int(sizes[0])), _Level(lower, "lower", int(sizes[1]))
        self.full = Pair(upper, lower)
        self._generator = torch.Generator().manual_seed(seed)
        if blocks:
            self._upper.cut(self._generator)
            self._lower.cut(self._generator)

    def __iter__(self) -> Iterator[Pair]:
        while True:
            yield self.draw()

    def draw(self) -> Pair:
        """Return the next pair."""
        upper, upper_id = self._upper.draw(self._generator)
        lower, lower_id = self._lower.draw(self._generator)
        return Pair(upper, lower, upper_id, lower_id)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the position in the stream."""
        return {"generator": self._generator.get_state()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go to a place in the stream of a sampler that was made with the same arguments."""
        self._generator.set_state(state["generator"])


class _Level:
    """The data of one level, and how batches are drawn from it."""

    def __init__(self, data: Tree, name: str, size: int) -> None:
        self.tensors, self._structure = flatten(data, name)
        lengths = {len(t) for t in self.tensors if t.dim()}
        if len(lengths) != 1 or any(t.dim() == 0 for t in self.tensors):
            shapes = [tuple(t.shape) for t in self.tensors]
            raise OptionError(f"Minibatches({name}=...): shapes {shapes} do not share one first dimension")
        self.count = lengths.pop()
        if size > self.count:
            raise OptionError(f"Minibatches(size={size}): the {name} level has only {self.count} samples")
        self.size = size
        self.blocks: Sequence[Tensor] | None = None

    def cut(self, generator: torch.Generator) -> None:
        """Cut the data into blocks, after a shuffle."""
        self.blocks = torch.randperm(self.count, generator=generator).split(self.size)

    def draw(self, generator: torch.Generator) -> tuple[Batch, int | None]:
        """Return a batch, and which block it is; None: there are no blocks."""
        if self.blocks is None:
            return self._at(torch.randint(self.count, (self.size,), generator=generator)), None
        chosen = int(torch.randint(len(self.blocks), (), generator=generator))
        return self._at(self.blocks[chosen]), chosen

    def _at(self, index: Tensor) -> Batch:
        return same_structure(self._structure, [t[index.to(t.device)] for t in self.tensors])


class Loaders:
    """Two DataLoaders, or other iterables that can be restarted. Each is repeated endlessly.

    The position of a loader cannot be saved. To resume, pass batches that continue where the saved run stopped.

    Args:
        upper: Yields the upper batches.
        lower: Yields the lower batches.

    >>> [tuple(pair)[:2] for pair, _ in zip(Loaders([1, 2], "abc"), range(4))]
    [(1, 'a'), (2, 'b'), (1, 'c'), (2, 'a')]
    """

    def __init__(self, upper: Iterable[Batch], lower: Iterable[Batch]) -> None:
        self._upper, self._lower = upper, lower

    def __iter__(self) -> Iterator[Pair]:
        upper, lower = _again(self._upper, "upper"), _again(self._lower, "lower")
        while True:
            yield Pair(next(upper), next(lower))


def _again(loader: Iterable[Batch], name: str) -> Iterator[Batch]:
    while True:
        some = False
        for batch in loader:
            some = True
            yield batch
        if not some:
            raise OptionError(f"batches: the {name} loader has no batch (left): pass one that can be iterated again")


class Source:
    """What a run draws its pairs from.

    Args:
        batches: None (full batch: both losses get the batch None), a `Minibatches`, or any iterable of pairs. One that
            ends is started again.
    """

    def __init__(self, batches: Iterable[object] | None) -> None:
        if batches is not None and not isinstance(batches, Iterable):
            raise OptionError(
                f"batches={batches!r}: pass Minibatches(...), Loaders(...), an iterable of pairs (upper batch, lower "
                "batch), or None for full batch"
            )
        self.batches = batches
        self._stream = None if batches is None else _again(batches, "pairs'")

    def draw(self) -> Pair:
        """Return the next pair."""
        if self._stream is None:
            return Pair(None, None, 0, 0)
        drawn = next(self._stream)
        if isinstance(drawn, Pair):
            return drawn
        if not isinstance(drawn, (tuple, list)) or len(drawn) != 2:
            raise OptionError(f"batches yielded {type(drawn).__name__}: each item must be (upper batch, lower batch)")
        return Pair(drawn[0], drawn[1])

    @property
    def full(self) -> Pair | None:
        """The pair of all data, where the source knows it."""
        if self._stream is None:
            return Pair(None, None, 0, 0)
        full: Pair | None = getattr(self.batches, "full", None)
        return full

    def state_dict(self) -> dict[str, Tensor]:
        """Return the place in the stream, where the source can tell."""
        return self.batches.state_dict() if isinstance(self.batches, Minibatches) else {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go to that place."""
        if isinstance(self.batches, Minibatches) and state:
            self.batches.load_state_dict(state)
