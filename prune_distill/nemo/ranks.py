"""Communication between ranks that share a stage's work, with PyTorch alone."""

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
    """Joins the process group of torchrun's ranks, each rank on its own GPU; does nothing for a single process."""
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


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor over all ranks."""
    if world_size() > 1:
        values = values.to(devices.torch_device())
        dist.all_reduce(values)
    return values.cpu()


def broadcast(value: Any) -> Any:
    """Returns the first rank's value on every rank."""
    box = [value]
    if world_size() > 1:
        dist.broadcast_object_list(box, 0)
    return box[0]


def all_gather(value: Any) -> list[Any]:
    """Returns all ranks' values on every rank, in the order of ranks."""
    found = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(found, value)
    return found


def exchange(value: Any) -> list[Any]:
    """Like `all_gather`, through torchrun's store: it works before there is a process group.

    Args:
        value: plain JSON data. All ranks make the same calls in the same order.
    """
    if world_size() == 1:
        return [value]
    number = next(_exchanges)
    _store().set(f"{number}/{rank()}", json.dumps(value))
    # `get` waits until that rank has called `set`; before it, a rank may read a large checkpoint for minutes.
    return [json.loads(_store().get(f"{number}/{other}")) for other in range(world_size())]


@cache
def _store() -> Any:
    store, _, _ = next(dist.rendezvous("env://", timeout=timedelta(hours=1)))
    return dist.PrefixStore("recipes/exchange", store)


def wait() -> None:
    """Returns once all ranks have called it."""
    all_gather(None)
