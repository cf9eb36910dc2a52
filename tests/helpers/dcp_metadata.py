"""A checkpoint's `.metadata` as torch's own objects, Megatron's class taken for torch's."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name == "MCoreMetadata":
            module, name = "torch.distributed.checkpoint.metadata", "Metadata"
        return super().find_class(module, name)


def read_metadata(weights: Path) -> Any:
    """`torch.distributed.checkpoint.metadata.Metadata` of a `torch_dist` folder."""
    with (weights / ".metadata").open("rb") as file:
        return _Unpickler(file).load()
