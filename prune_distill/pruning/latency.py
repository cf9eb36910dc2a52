"""Estimate the time of a shape's forward pass on this machine from a table of measured layers.

All layers of a model have the same shape, so the estimate is the sum of its layers, embedding and output layer. Between
the smallest and the largest FFN, the time of a layer is interpolated linearly.
"""

from __future__ import annotations

import copy
import dataclasses
import time
from typing import Any

import torch

from prune_distill.pruning.losses import skip_layers
from prune_distill.schema import Shape

LAYERS = 2
WARM_UP = 2
ROUNDS = 7


class LatencyTable:
    """Milliseconds of a layer, and of all other parts, by hidden size, heads, groups and FFN; measured on first use.

    Args:
        model: a NeMo model on one rank; the layers are built from its config and tokenizer.
        ffns: the smallest and the largest FFN of interest.
        ids: the batch to time, `[b, s]`.
    """

    def __init__(self, model: Any, ffns: tuple[int, int], ids: torch.Tensor) -> None:
        self.model = model
        self.ffns = ffns
        self.ids = ids
        self.measured: dict[tuple[int, int, int, int], tuple[float, float]] = {}

    def __call__(self, shape: Shape) -> float:
        """Return the milliseconds of a forward pass of a shape over the batch."""
        low, high = self.ffns
        (layer_low, rest), (layer_high, _) = self._times(shape, low), self._times(shape, high)
        share = (shape.ffn_hidden_size - low) / (high - low) if high > low else 0.0
        return rest + shape.num_layers * (layer_low + share * (layer_high - layer_low))

    def table(self) -> dict[str, Any]:
        """Return the measurements as plain data."""
        names = ("hidden_size", "num_attention_heads", "num_query_groups", "ffn_hidden_size")
        rows = [
            {**dict(zip(names, key, strict=True)), "layer_ms": layer, "around_ms": rest}
            for key, (layer, rest) in self.measured.items()
        ]
        return {"batch_size": self.ids.shape[0], "seq_length": self.ids.shape[1], "rows": rows}

    def _times(self, shape: Shape, ffn: int) -> tuple[float, float]:
        """Return the milliseconds of one layer, and of embedding, final norm and output layer."""
        key = (shape.hidden_size, shape.num_attention_heads, shape.num_query_groups, ffn)
        if key not in self.measured:
            core = self._build(dataclasses.replace(shape, ffn_hidden_size=ffn))
            with skip_layers(core, range(1, LAYERS + 1)):
                rest = _milliseconds(core, self.ids)
            self.measured[key] = (max(0.0, _milliseconds(core, self.ids) - rest) / LAYERS, rest)
        return self.measured[key]

    def _build(self, shape: Shape) -> Any:
        config = copy.copy(self.model.config)
        for name in ("hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels"):
            setattr(config, name, getattr(shape, name))
        config.num_layers = LAYERS
        core = config.configure_model(self.model.tokenizer)
        return core.to(device=self.ids.device, dtype=config.params_dtype).eval()


def _milliseconds(core: Any, ids: torch.Tensor) -> float:
    """Return the minimum over several forward passes, because other load only adds time."""
    positions = torch.arange(ids.shape[1], device=ids.device).expand(len(ids), -1)
    seconds = []
    with torch.no_grad():
        for _ in range(WARM_UP + ROUNDS):
            torch.cuda.synchronize()
            start = time.perf_counter()
            core(ids, positions, None)
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
    return 1000 * min(seconds[WARM_UP:])
