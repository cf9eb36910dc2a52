"""Compare a written quantized model with the simulation that it was written from."""

from __future__ import annotations

from pathlib import Path

import torch

from prune_distill.quantization import reader

# Largest relative error of the logits, in fp32 and in types of 16 bits. ModelOpt's simulation and the reader round
# alike, but after other roundings to the type of the model values near the border of two steps go to different sides:
# 4e-7 to 0.004 in fp32, up to 0.07 in tiny bf16 models. A scale of one of their 21 layers that is three times too large
# makes 0.46.
MOST_ERROR, MOST_ERROR_16_BIT = 0.05, 0.2


def check_export(folder: Path, ids: torch.Tensor, simulated: torch.Tensor) -> float:
    """Return the relative error (root mean square) of a written model's logits.

    Args:
        ids: sequences `[b, s]`.
        simulated: their logits `[b, s, v]` in ModelOpt's simulation.

    Raises:
        RuntimeError: the two differ by more than rounding.
    """
    model = reader.load(folder)
    with torch.inference_mode():
        written, expected = (_center(logits) for logits in (model(ids.to(model.device)).logits, simulated))
        error = ((written - expected).norm() / expected.norm()).item()
    most = MOST_ERROR if model.dtype == torch.float32 else MOST_ERROR_16_BIT
    if not error <= most:
        raise RuntimeError(
            f"{folder.name}: the logits of the written model differ from those of ModelOpt's simulation by {error:.2%}"
            f" (at most {most:.1%}): a fault of the export"
        )
    return error


def _center(logits: torch.Tensor) -> torch.Tensor:
    """Remove the mean over the vocabulary, which does not affect probabilities."""
    return logits.float() - logits.float().mean(-1, keepdim=True)
