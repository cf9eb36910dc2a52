"""Communication between the ranks of a stage, with PyTorch alone."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import Any

import torch
import torch.distributed as dist

from prune_distill.nemo import devices
from prune_distill.pipeline.stage_main import rank, world_size

_exchanges = itertools.count()


@contextmanager
def join_process_group() -> Iterator[None]:
    """Join the process group of torchrun's ranks, one GPU per rank. Does nothing for a single process."""
    if world_size() == 1:
        yield
        return
    on_gpu = devices.torch_device() == "cuda"
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if on_gpu else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def all_reduce(values: torch.Tensor) -> torch.Tensor:
    """All-reduce the sum of a tensor; returns it on the CPU."""
    if world_size() > 1:
        values = values.to(devices.torch_device())
        dist.all_reduce(values)
    return values.cpu()


def broadcast(value: Any) -> Any:
    """Return rank 0's value on every rank."""
    box = [value]
    if world_size() > 1:
        dist.broadcast_object_list(box, 0)
    return box[0]


def all_gather(value: Any) -> list[Any]:
    """Return the values of all ranks on every rank, in order of rank."""
    found = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(found, value)
    return found


def exchange(value: Any) -> list[Any]:
    """All-gather through torchrun's store, which works without a process group.

    Args:
        value: JSON data. All ranks make the same calls in the same order.
    """
    if world_size() == 1:
        return [value]
    number = next(_exchanges)
    _store().set(f"{number}/{rank()}", json.dumps(value))
    # `get` waits for `set`: a rank may read a large checkpoint for minutes before.
    return [json.loads(_store().get(f"{number}/{other}")) for other in range(world_size())]


@cache
def _store() -> Any:
    store, _, _ = next(dist.rendezvous("env://", timeout=timedelta(hours=1)))
    return dist.PrefixStore("recipes/exchange", store)


def wait() -> None:
    """Wait until all ranks have called this function."""
    all_gather(None)
