"""python -m convert.verify --config RUN_DIR/resolved.yaml
python -m convert.verify --hf-model FOLDER --checkpoint FOLDER [--tokens 128]

Checks both conversions: on held-out text, the logits of a NeMo checkpoint against those of its Hugging Face twin.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import Any

from conf.errors import InputError
from conf.schema import RunConfig
from recipes.runtime.stage_main import command_line, stage_main

log = logging.getLogger("convert.verify")

# Share of the largest logit by which twins may differ. On a CPU they differ by the order of their sums alone (1e-6 of
# it); on a GPU Transformer Engine multiplies fp32 as TF32, whose step is 1e-3. A wrong tensor costs more than a tenth.
LARGEST_SHARE = 0.05


def run(cfg: RunConfig, inputs: dict[str, Any], out: Path) -> dict[str, Any]:
    """Inputs: teacher and student, each as `_hf` and `_nemo`, and data. Its metrics: the largest differences."""
    from recipes.runtime import backend

    backend.activate()
    import torch

    from recipes.runtime.data.folder import DataFolder
    from recipes.runtime.huggingface import local_folder

    data = DataFolder.read(inputs["data"])
    tokens = min(cfg.evaluate.verify_tokens, cfg.evaluate.seq_length, data.validation_tokens - 1)
    ids = torch.from_numpy(data.validation_sequences(tokens)[:1, :-1])
    metrics: dict[str, Any] = {"tokens": tokens}
    for check, model in (("import", "teacher"), ("export", "student")):
        folder = local_folder(inputs[f"{model}_hf"], cfg.model.revision if model == "teacher" else None, weights=True)
        metrics[f"{check}_max_abs_logit_diff"] = check_twins(folder, inputs[f"{model}_nemo"], ids)
    return metrics


def check_twins(hf_folder: Path, checkpoint: Path, ids: Any) -> float:
    """The largest absolute difference of the logits of a NeMo checkpoint and its Hugging Face twin.

    Args:
        ids: `[b, s]` int64 token ids.

    Raises:
        InputError: it is more than rounding explains.
    """
    difference, largest = compare_logits(hf_folder, checkpoint, ids)
    log.info("%s: logits differ by at most %.2e, the largest is %.1f", checkpoint, difference, largest)
    if not difference <= LARGEST_SHARE * largest:
        raise InputError(
            f"the logits of {checkpoint} and {hf_folder} differ by up to {difference:.2e}, the largest being"
            f" {largest:.1f}: they are not the same model"
        )
    return difference


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
    twin = AutoModelForCausalLM.from_pretrained(hf_folder, torch_dtype=torch.float32).to(device).eval()
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hf-model", required=True, type=Path, help="a Hugging Face model's folder")
    parser.add_argument("--checkpoint", required=True, type=Path, help="a NeMo checkpoint (its context is code)")
    parser.add_argument("--tokens", type=int, default=128, help="how many random tokens to compare on (128)")
    args = parser.parse_args()
    with command_line():
        from recipes.runtime import backend

        backend.activate()
        import torch
        from transformers import AutoConfig

        vocab_size = AutoConfig.from_pretrained(args.hf_model).vocab_size
        ids = torch.randint(vocab_size, (1, args.tokens), generator=torch.Generator().manual_seed(0))
        print(f"max_abs_logit_diff {check_twins(args.hf_model, args.checkpoint, ids):.3e}")


if __name__ == "__main__":
    if "--config" in sys.argv:
        stage_main(run, "verify")
    else:
        main()
