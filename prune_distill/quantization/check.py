"""Compare a written quantized model with the simulation that it was written from."""

from __future__ import annotations

from pathlib import Path

import torch

from prune_distill.quantization import reader

# Largest KL divergence in nats per token. ModelOpt's simulation and the reader round alike, up to the type of the
# model: bf16 models differ by about 1e-3. Wrong scales or a wrong order of weights make a model as bad as a random one.
MOST_KL = 0.05


def check_export(folder: Path, ids: torch.Tensor, simulated: torch.Tensor) -> float:
    """Return KL(simulated || written model) in nats per token on some sequences.

    Args:
        ids: sequences `[b, s]`.
        simulated: their logits `[b, s, v]` in ModelOpt's simulation.

    Raises:
        RuntimeError: the two differ by more than rounding.
    """
    model = reader.load(folder)
    with torch.inference_mode():
        written = torch.log_softmax(model(ids.to(model.device)).logits.float(), -1)
        expected = torch.log_softmax(simulated.float(), -1)
        kl = torch.nn.functional.kl_div(written, expected, reduction="none", log_target=True).sum(-1).mean().item()
    if not kl <= MOST_KL:
        raise RuntimeError(
            f"{folder.name}: the written model differs from ModelOpt's simulation by {kl:.4f} nats per token (at most"
            f" {MOST_KL}): a fault of the export"
        )
    return kl
