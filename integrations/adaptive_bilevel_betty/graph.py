"""Which problems answer to which, from the paths along which Betty differentiates."""

from __future__ import annotations

import graphlib

from .release import Problem

__all__ = ["edges", "lookahead"]


def edges(problem: Problem) -> dict[Problem, list[Problem]]:
    """Return whom each problem that this one looks ahead into answers to, lowest first.

    A path of Betty's, [me, p_n, ..., p_1, me], is the chain along which it differentiates: p_1 answers to me, p_2 to
    p_1, and so on. The result maps p_1 to [me, ...], p_2 to [p_1, ...]; with several paths, in an order that fits all.
    """
    answers: dict[Problem, list[Problem]] = {}
    for path in problem.paths:
        for lower, upper in zip(path[-2:0:-1], path[:1:-1], strict=True):
            known = answers.setdefault(lower, [])
            if upper not in known:
                known.append(upper)
    within = {lower: [upper for upper in uppers if upper in answers] for lower, uppers in answers.items()}
    return {lower: answers[lower] for lower in graphlib.TopologicalSorter(within).static_order()}


def lookahead(problem: Problem) -> list[Problem]:
    """Return the problems whose solutions answer to this one's parameters, lowest first."""
    return list(edges(problem))
