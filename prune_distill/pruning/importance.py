"""Importance of layers, channels and heads, saved as safetensors.

ModelOpt saves its scores as a pickle for one pipeline layout (modelopt/torch/opt/searcher.py:242 and
modelopt/torch/nas/plugins/megatron.py:1576), and does not check whether a file belongs to the model. Here they are
plain tensors by layer number, which any layout can load; the hash of the stage covers the model and the data.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from prune_distill.atomic_files import replace_file
from prune_distill.errors import InputError
from prune_distill.nemo.chance import require_better_than_chance
from prune_distill.schema import PruneConfig

log = logging.getLogger("recipes.importance")

FILE = "importance.safetensors"


@dataclass(frozen=True)
class Importance:
    """Importance scores from calibration, by layer number (from 1).

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
        """Return the layers that ModelOpt would drop: those with the lowest scores
        (modelopt/torch/nas/plugins/megatron.py:1525)."""
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
    """Reject non-finite activations. Raises: InputError, which names the layer."""
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
                    f"layer {number}: activations of its {name} are non-finite on the calibration text; the weights "
                    "are "
                    "damaged or overflow in the model's precision; check model.hf_path"
                )


def warn_if_few_sequences(prune: PruneConfig, train_tokens: int) -> None:
    """Warn if the training documents contain fewer sequences than calibration reads."""
    available = (train_tokens - 1) // prune.calibration_seq_length
    if available < prune.calibration_samples:
        log.warning(
            "prune.calibration_samples=%d: the training documents contain only %d sequences of %d tokens, so text is "
            "repeated, which adds nothing; add documents, or lower prune.calibration_samples",
            prune.calibration_samples,
            available,
            prune.calibration_seq_length,
        )


def check_loss(loss: float, vocab_size: int) -> None:
    """Check the teacher's loss on the calibration text, in nats per token.

    Raises:
        InputError: the loss is non-finite or not better than chance, so that weights or tokenizer must be wrong.
    """
    if not math.isfinite(loss):
        raise InputError(
            f"the teacher's loss on the calibration text is {loss}: its logits are non-finite; check the weights of the"
            " output layer in model.hf_path"
        )
    fix = "check that model.hf_path holds trained weights and their own tokenizer"
    require_better_than_chance(loss, vocab_size, "the calibration text", fix)
