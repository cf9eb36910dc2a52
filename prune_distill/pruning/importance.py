"""Importance of layers, channels and heads, saved as safetensors.

ModelOpt saves its scores as a pickle for one pipeline layout (modelopt/torch/opt/searcher.py:242 and
modelopt/torch/nas/plugins/megatron.py:1576), and does not check whether a file belongs to the model. Here they are
plain tensors by layer number, which any layout can load; the stage's folder ties them to the model and the data.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from prune_distill.atomic_files import replace_file
from prune_distill.errors import InputError

FILE = "importance.safetensors"


@dataclass(frozen=True)
class Importance:
    """Scores from the forward passes of calibration, by layer number (from 1).

    Activations are squared means over a sequence, summed over sequences (Minitron: L2 over the batch, mean over the
    sequence); the scores are their square roots.

    Attributes:
        layers: 1 - cosine similarity of a layer's input and output, summed over batches; higher is more important.
        hidden: activations of the two norms' outputs, each `[hidden_size]`.
        ffn: activations of the down projection's inputs, `[ffn_hidden_size]`; of a mixture `[experts,
            moe_ffn_hidden_size]`, 0 for an expert that received no token.
        heads: activations of the output projection's inputs, `[num_attention_heads * kv_channels]`.
        experts: of a mixture, `[2, experts]`: the norms of each expert's outputs summed over its tokens, and the number
            of these tokens.
    """

    layers: dict[int, float]
    hidden: dict[int, list[torch.Tensor]]
    ffn: dict[int, torch.Tensor]
    heads: dict[int, torch.Tensor]
    experts: dict[int, torch.Tensor] = field(default_factory=dict)

    def least_important(self, count: int) -> list[int]:
        """The layers that ModelOpt would drop: those of lowest score (modelopt/torch/nas/plugins/megatron.py:1525)."""
        order = sorted(sorted(self.layers), key=lambda layer: self.layers[layer], reverse=True)
        return sorted(order[len(order) - count :])

    def save(self, folder: Path) -> None:
        tensors = {"layers": torch.tensor([self.layers[n] for n in sorted(self.layers)], dtype=torch.float64)}
        for n in self.layers:
            tensors |= {f"{n}.ffn": self.ffn[n], f"{n}.heads": self.heads[n]}
            tensors |= {f"{n}.experts": self.experts[n]} if self.experts else {}
            tensors |= {f"{n}.hidden.{index}": norm for index, norm in enumerate(self.hidden[n])}
        with replace_file(folder / FILE) as temporary:
            save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, temporary)

    @classmethod
    def load(cls, folder: Path, device: Any = "cpu") -> Importance:
        tensors = load_file(folder / FILE, device=str(device))
        layers = dict(enumerate(tensors["layers"].tolist(), 1))
        return cls(
            layers,
            {n: [tensors[f"{n}.hidden.{index}"] for index in range(2)] for n in layers},
            {n: tensors[f"{n}.ffn"] for n in layers},
            {n: tensors[f"{n}.heads"] for n in layers},
            {n: tensors[f"{n}.experts"] for n in layers if f"{n}.experts" in tensors},
        )


def refuse_infinite(importance: Importance) -> None:
    """Raises: InputError, naming the layer whose activations are not finite."""
    for number in importance.layers:
        parts = {
            "norms": torch.stack(importance.hidden[number]),
            "attention": importance.heads[number],
            "MLP": importance.ffn[number],
            "output": torch.tensor(importance.layers[number]),
            **({"experts": importance.experts[number]} if importance.experts else {}),
        }
        for name, values in parts.items():
            if not torch.isfinite(values).all():
                raise InputError(
                    f"layer {number}: activations of its {name} are not finite on the calibration text; the model's "
                    "weights are damaged, or its precision is too narrow for them: check model.hf_path"
                )
