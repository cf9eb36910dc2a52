"""python -m convert.verify --config RUN_DIR/resolved.yaml

Checks both conversions: on held-out text, the logits of a NeMo checkpoint against those of its Hugging Face twin.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from conf.errors import InputError
from conf.schema import RunConfig
from recipes.runtime.stage_main import stage_main

log = logging.getLogger("verify")

# Share of the largest logit by which twins may differ. On a CPU they differ by the order of their sums alone (1e-6 of
# it); on a GPU Transformer Engine multiplies fp32 as TF32, whose step is 1e-3. A wrong tensor costs more than a tenth.
LARGEST_SHARE = 0.05


def run(cfg: RunConfig, inputs: dict[str, Any], out: Path) -> dict[str, Any]:
    """Inputs: teacher and student, each as `_hf` and `_nemo`, and data. Its metrics: the largest differences."""
    from recipes.runtime import backend

    backend.activate()
    import torch

    from recipes.runtime.huggingface import local_folder
    from recipes.runtime.indexed_data import DataFolder

    data = DataFolder.read(inputs["data"])
    tokens = min(cfg.evaluate.verify_tokens, cfg.evaluate.seq_length, data.validation_tokens - 1)
    ids = torch.from_numpy(data.validation_sequences(tokens)[:1, :-1])
    metrics: dict[str, Any] = {"tokens": tokens}
    for check, model in (("import", "teacher"), ("export", "student")):
        folder = local_folder(inputs[f"{model}_hf"], cfg.model.revision if model == "teacher" else None, weights=True)
        difference, largest = compare_logits(folder, inputs[f"{model}_nemo"], ids)
        log.info("%s of the %s: logits differ by at most %.2e, the largest is %.1f", check, model, difference, largest)
        if not difference <= LARGEST_SHARE * largest:
            raise InputError(
                f"after {check} the {model}'s logits differ by up to {difference:.2e} between Hugging Face and NeMo, the"
                f" largest being {largest:.1f}: the conversion of this model can't be trusted"
            )
        metrics[f"{check}_max_abs_logit_diff"] = difference
    return metrics


def compare_logits(hf_folder: Path, checkpoint: Path, ids: Any) -> tuple[float, float]:
    """The largest absolute difference of two twins' fp32 logits on the same tokens, and the largest absolute logit.

    Args:
        ids: `[b, s]` int64 token ids.
    """
    import torch
    from nemo.lightning.base import teardown
    from transformers import AutoModelForCausalLM

    from recipes.runtime import backend, nemo_api

    device = backend.activate().device
    twin = AutoModelForCausalLM.from_pretrained(hf_folder, dtype=torch.float32).to(device).eval()
    with torch.inference_mode():
        theirs = twin(ids.to(device), use_cache=False).logits.cpu()
    del twin
    model, trainer = nemo_api.restore(checkpoint)
    core = nemo_api.core_model(model).eval().float()  # bf16 weights are fp32 numbers: nothing is lost
    with torch.inference_mode():
        positions = torch.arange(ids.shape[1], device=device).expand(ids.shape[0], -1)
        ours = core(ids.to(device), positions, None).cpu()
    teardown(trainer)
    difference = (ours[..., : theirs.shape[-1]] - theirs).abs().max()
    return difference.item(), theirs.abs().max().item()


if __name__ == "__main__":
    stage_main(run, "verify")
