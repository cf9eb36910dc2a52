"""Run functions on several ranks, over gloo on this machine."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any
from unittest.mock import patch

from tests.helpers.fork_server import python_path
from tests.helpers.fork_site.sitecustomize import RANK_FUNCTION


class RankError(RuntimeError):
    """A rank failed; the message holds its traceback."""


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120) -> list[Any]:
    """Call `function(*args)` on every rank of a gloo group and return what the ranks returned, in rank order.

    Each rank is a fresh process (`function` must be importable) with one thread and the variables that torchrun sets.

    Raises:
        RankError: with the traceback of the first rank that failed; the others are killed.
        TimeoutError: if a rank is not done after `timeout` seconds; all are killed.
    """
    context = multiprocessing.get_context("spawn")
    variables = {"OMP_NUM_THREADS": "1", "PYTHONPATH": python_path(), RANK_FUNCTION: function.__name__}
    variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    variables["WORLD_SIZE"] = variables["LOCAL_WORLD_SIZE"] = str(world_size)
    processes, readers = [], []
    try:
        for rank in range(world_size):
            reader, writer = context.Pipe(duplex=False)
            process = context.Process(target=_run_rank, args=(writer, function, args, timeout))
            with patch.dict(os.environ, variables, RANK=str(rank), LOCAL_RANK=str(rank)):
                process.start()
            writer.close()
            processes.append(process)
            readers.append(reader)
        results = _collect(readers, time.monotonic() + timeout, timeout)
        for process in processes:
            process.join(timeout=10)
        return results
    finally:
        for process in processes:
            process.kill()
            process.join()


def _collect(readers: list[Connection], deadline: float, timeout: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(readers):
        open_readers = [reader for rank, reader in enumerate(readers) if rank not in results]
        ready = wait(open_readers, max(0.0, deadline - time.monotonic()))
        if not ready:
            missing = sorted(set(range(len(readers))) - results.keys())
            raise TimeoutError(f"ranks {missing} were not done after {timeout} s")
        for reader in ready:
            rank = readers.index(reader)  # type: ignore[arg-type]
            results[rank] = _receive(rank, readers[rank])
    return [results[rank] for rank in range(len(readers))]


def _receive(rank: int, reader: Connection) -> Any:
    try:
        failure, result = pickle.loads(reader.recv_bytes())
    except EOFError:
        raise RankError(f"rank {rank} died without a word") from None
    if failure is not None:
        raise RankError(f"rank {rank} failed:\n{failure}")
    return result


def _run_rank(writer: Connection, function: Callable[..., Any], args: tuple[Any, ...], timeout: float) -> None:
    import torch.distributed as dist

    try:
        dist.init_process_group("gloo", timeout=timedelta(seconds=timeout))
        message = pickle.dumps((None, function(*args)))
    except BaseException:
        message = pickle.dumps((traceback.format_exc(), None))
    writer.send_bytes(message)
    if dist.is_initialized():
        dist.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
