"""Save a checkpoint again with Megatron's writer on several ranks, each of which holds a part of every tensor."""

from __future__ import annotations

from pathlib import Path

KEY = "module.decoder.layers.mlp.linear_fc2.weight"


def save_parts(weights: Path, target: Path, split: str) -> None:
    """Run on every rank: save the stacked matrix `KEY` sharded by "rows", "columns" or "layers".

    Args:
        weights, target: folders of `torch_dist` checkpoints, read and written.
    """
    from prune_distill.nemo import backend

    backend.activate()
    import torch
    import torch.distributed as dist
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import ShardedTensor

    from convert.stored import blocks
    from convert.torch_dist import TorchDistReader

    rank, ranks = dist.get_rank(), dist.get_world_size()
    reader = TorchDistReader(weights)
    layers, rows, columns = reader.tensors[KEY].shape
    state = {}
    for layer in range(layers):
        if split == "layers" and layer % ranks != rank:
            continue
        matrix = reader.tensor(KEY, layer)
        whole = torch.frombuffer(bytearray(b"".join(blocks(matrix))), dtype=torch.float32).reshape(rows, columns)
        axis = {"rows": 0, "columns": 1}.get(split)
        part = whole if axis is None else whole.chunk(ranks, axis)[rank].contiguous()
        offsets = [(0, layer, layers)] + ([] if axis is None else [(axis + 1, rank, ranks)])
        state[f"{layer}"] = ShardedTensor.from_rank_offsets(KEY, part, *offsets, prepend_axis_num=1)
    if rank == 0:
        target.mkdir()
    dist.barrier()
    dist_checkpointing.save(state, str(target))
