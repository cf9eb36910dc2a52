"""Compare the logits of two models, each a Hugging Face model or a NeMo checkpoint."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from nemo.lightning.base import teardown

from convert import families
from convert.exporting import find_carried_files, is_checkpoint
from prune_distill.data.hf_tokenizer import load_tokenizer
from prune_distill.errors import InputError
from prune_distill.nemo import backend, hf_models, nemo_api
from prune_distill.schema import ExportDtype

log = logging.getLogger("convert.verify")

# Tolerance, as a fraction of the largest logit. On a CPU, equal models differ only by the order of sums (1e-6 of
# it); on a GPU Transformer Engine uses TF32 for fp32, with a step of 1e-3. A wrong tensor causes more than 0.1.
LARGEST_SHARE = 0.05


@dataclass(frozen=True)
class Parity:
    """Comparison of two models' logits on the same tokens.

    Attributes:
        max_abs_diff: largest absolute difference of two logits.
        largest: largest absolute logit of the first model.
        top1_agreement: fraction of positions with the same most probable token.
        kl: mean KL(first || second), nats per token.
    """

    max_abs_diff: float
    largest: float
    top1_agreement: float
    kl: float

    def __str__(self) -> str:
        return (
            f"logits differ by at most {self.max_abs_diff:.2e} (the largest is {self.largest:.1f}), the most probable"
            f" token is the same at {self.top1_agreement:.2%} of the positions, KL divergence {self.kl:.2e}"
        )


def compare_logits(first: Path, second: Path, ids: np.ndarray) -> Parity:
    """Compare two models' fp32 logits.

    Args:
        ids: `[b, s]` int64 token ids.

    Raises:
        InputError: they differ by more than rounding errors.
    """
    logits, others = (compute_logits(folder, torch.from_numpy(ids)) for folder in (first, second))
    size = min(logits.shape[-1], others.shape[-1])  # a checkpoint's vocabulary may be padded
    logits, others = logits[..., :size], others[..., :size]
    log_p, log_q = (F.log_softmax(model.double(), -1) for model in (logits, others))
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    parity = Parity(
        (others - logits).abs().max().item(),
        logits.abs().max().item(),
        (others.argmax(-1) == logits.argmax(-1)).float().mean().item(),
        kl.item(),
    )
    log.info("%s and %s: %s", first, second, parity)
    if not parity.max_abs_diff <= LARGEST_SHARE * parity.largest:
        raise InputError(f"{first} and {second} are different models: {parity}")
    return parity


def compute_logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """Return a model's fp32 logits `[b, s, v]`, computed by transformers or, for a checkpoint, by NeMo."""
    device = backend.activate().device
    if not is_checkpoint(folder):
        model = hf_models.load(folder, ExportDtype.fp32)
        with torch.inference_mode():
            found: torch.Tensor = model(ids.to(device), use_cache=False).logits.cpu()
        return found
    model, trainer = nemo_api.restore(folder)
    core = nemo_api.core_model(model).eval().float()  # exact: bf16 weights are fp32 numbers
    with torch.inference_mode():
        positions = torch.arange(ids.shape[1], device=device).expand(ids.shape[0], -1)
        result: torch.Tensor = core(ids.to(device), positions, None).cpu()
    teardown(trainer)
    return result


def token_ids(folders: list[Path], text: Path | None, count: int) -> np.ndarray:
    """Return `[1, s]` int64 ids of a text, with the first Hugging Face folder's tokenizer, or random ids.

    Raises:
        InputError: the text has no tokens, or the tokenizer or configuration cannot be loaded.
    """
    folder = next((folder for folder in folders if not is_checkpoint(folder)), None) or find_carried_files(folders[0])
    try:
        if text is None:
            vocabulary = families.read_config(folder)["vocab_size"]
            return np.random.default_rng(0).integers(vocabulary, size=(1, count))
        ids = load_tokenizer(folder)(text.read_text())["input_ids"][:count]
    except InputError:
        raise
    except Exception as error:  # transformers raises errors of any kind
        raise InputError(
            f"the text cannot be tokenized ({type(error).__name__}: {error}); see {text or folder}"
        ) from error
    if not ids:
        raise InputError(f"--text={text}: no tokens; choose another text")
    return np.array([ids])
