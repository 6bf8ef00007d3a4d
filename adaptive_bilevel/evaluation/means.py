"""What a closure's gradients are where several processes step together: the means of theirs, taken once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import processes
from .closures import Differentiated
from .parts import in_parts
from .replicated import Replicated

__all__ = ["averaged", "joined"]


def joined(evaluate: Callable[[], Differentiated], inputs: Sequence[Tensor], replicated: Replicated) -> Differentiated:
    """Return what is evaluated, its gradients being means over the processes; its loss is this process's own.

    Args:
        evaluate: Differentiates a closure.
        inputs: What by.
        replicated: Notes the modules that run.
    """
    if processes.count() == 1:
        return evaluate()
    replicated.forget()
    places = list(range(len(inputs)))

    def parts(found: Differentiated | None) -> tuple[list[Tensor | None], list[Tensor]]:
        nonlocal places
        if found is None:
            like = [p for p in inputs if not in_parts(p)]
            return [None] * len(like), like
        done = replicated.averaged(inputs, found.gradients)
        places = [i for i, p in enumerate(inputs) if id(p) not in done]
        gradients, like = [found.gradients[i] for i in places], [inputs[i] for i in places]
        if found.looked and like:  # such a closure may change .grad on some processes only
            changed = torch.zeros(1, device=like[0].device)
            gradients, like = [*gradients, None if found.own is None else changed], [*like, changed]
        return gradients, like

    found, means = processes.means_of(evaluate, parts)
    own = found.own
    if found.looked and places:
        means, changed = means[:-1], means[-1]
        if changed is not None:
            own = averaged(found.gradients if own is None else own, inputs)
    gradients = list(found.gradients)
    for i, g in zip(places, means, strict=True):
        gradients[i] = g
    return found._replace(gradients=gradients, own=own)


def averaged(gradients: Sequence[Tensor | None], inputs: Sequence[Tensor]) -> list[Tensor | None]:
    """Return means over the processes of gradients that were evaluated elsewhere.

    Args:
        gradients: One for each input; one that is None on every process stays None. Those of parameters in parts are
            means already.
        inputs: What they are gradients by.
    """
    found, places = list(gradients), [i for i, p in enumerate(inputs) if not in_parts(p)]
    if processes.count() == 1 or not places:
        return found
    here, like = [gradients[i] for i in places], [inputs[i] for i in places]
    for i, g in zip(places, processes.means_of(lambda: None, lambda _: (here, like))[1], strict=True):
        found[i] = g
    return found
