"""Tests in several processes of one group.

The processes are started once, since that takes seconds, and wait for the next test. Each test has a group of its own.
They are forks of one that has imported what they need, and has done nothing else.
"""

from __future__ import annotations

import socket
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from torch import distributed, multiprocessing

WORLD = 2
LIMIT = timedelta(seconds=30)  # processes that disagree wait for each other

_PRELOADED = ["adaptive_bilevel", "pytest", "torch.distributed.checkpoint", "torch.distributed.fsdp"]

_waiting: list[tuple[BaseProcess, Connection]] = []


def results_of(work: Callable[[int], Any], world: int = WORLD) -> list[Any]:
    """Return what a function of the module, called with the rank, returns in each process of a group.

    Args:
        work: The function, or a `functools.partial` of it.
        world: The number of processes.
    """
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = int(s.getsockname()[1])
    while len(_waiting) < world:
        _waiting.append(_started())
    ranks = {connection: rank for rank, (_, connection) in enumerate(_waiting[:world])}
    for connection, rank in ranks.items():
        connection.send((work, rank, world, port))
    results: dict[int, Any] = {}
    try:
        while len(results) < world:
            ready = wait([connection for connection, rank in ranks.items() if rank not in results])
            for connection, rank in [(c, rank) for c, rank in ranks.items() if c in ready]:
                failed, results[rank] = connection.recv()
                if failed:
                    raise RuntimeError(f"process {rank}: {results[rank]}")
    except BaseException:
        end()  # others may wait for the one that has failed
        raise
    return [results[rank] for rank in range(world)]


def _started() -> tuple[BaseProcess, Connection]:
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context: Any = multiprocessing.get_context(method)
    context.set_forkserver_preload(_PRELOADED)
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there,), daemon=True)
    process.start()
    there.close()
    return process, here


def end() -> None:
    """End the processes that wait; the next test starts new ones."""
    for process, connection in _waiting:
        process.kill()
        process.join()
        connection.close()
    _waiting.clear()


def _serve(connection: Connection) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    while True:
        try:
            work, rank, world, port = connection.recv()
        except EOFError:
            return
        try:
            connection.send((False, _work(work, rank, world, port)))
        except BaseException:
            connection.send((True, traceback.format_exc()))


def _work(work: Callable[[int], Any], rank: int, world: int, port: int) -> Any:
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world, timeout=LIMIT
    )
    result = work(rank)
    distributed.barrier()  # a group that ends while others still connect is an error of theirs
    distributed.destroy_process_group()
    return result


def told(attempt: Callable[[], Any]) -> str:
    """The error of an attempt, as a line."""
    try:
        attempt()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"
