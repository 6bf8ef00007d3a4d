"""Tests in several processes of one group."""

from __future__ import annotations

import socket
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from torch import distributed, multiprocessing

WORLD = 2
LIMIT = timedelta(seconds=30)  # processes that disagree wait for each other


def results_of(work: Callable[[int], Any], world: int = WORLD) -> list[Any]:
    """Return what a function of the module, called with the rank, returns in each process of a group.

    Args:
        work: The function, or a `functools.partial` of it.
        world: The number of processes.
    """
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = int(s.getsockname()[1])
    with multiprocessing.get_context("spawn").Manager() as manager:
        results = manager.dict()
        multiprocessing.spawn(_work, (work, world, port, results), nprocs=world)
        return [results[rank] for rank in range(world)]


def _work(rank: int, work: Callable[[int], Any], world: int, port: int, results: Any) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world, timeout=LIMIT
    )
    results[rank] = work(rank)
    distributed.destroy_process_group()
