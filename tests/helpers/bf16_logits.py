"""python -m tests.helpers.bf16_logits HF CHECKPOINT: logits in bf16, by Megatron's model and by transformers.

Both are compared with transformers in fp32 on the same bf16 weights. Prints one JSON object: |found - fp32| / |fp32| in
the Euclidean norm of `megatron` and `transformers`, the `layers` of Transformer Engine in Megatron's model, and the
`device`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.helpers.models import write_model
from tests.helpers.tiny import convert, environment


def compare_logits(folder: Path) -> dict[str, Any]:
    """Write a tiny Qwen3 in bf16 to `folder`, convert it, and return what this module prints."""
    hf, nemo = folder / "hf", folder / "nemo"
    write_model("qwen3_untied_bf16", hf)
    convert("hf_to_nemo", "--hf-model", hf, "--out", nemo)
    command = [sys.executable, "-W", "ignore", "-m", "tests.helpers.bf16_logits", str(hf), str(nemo)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    from prune_distill.nemo import backend

    device = backend.activate().device
    import torch

    from prune_distill.nemo import hf_models, nemo_api
    from prune_distill.schema import ExportDtype, Precision

    hf, checkpoint = map(Path, sys.argv[1:])
    ids = torch.randint(517, (2, 96), generator=torch.Generator().manual_seed(0)).to(device)

    def by_transformers(dtype: ExportDtype) -> torch.Tensor:
        with torch.inference_mode():
            logits: torch.Tensor = hf_models.load(hf, dtype)(ids, use_cache=False).logits
        return logits.double()

    model, _ = nemo_api.restore(checkpoint, precision=Precision.bf16)
    core = nemo_api.core_model(model).eval()
    types = {parameter.dtype for parameter in core.parameters()}
    assert types == {torch.bfloat16}, types
    with torch.inference_mode():
        found = core(ids, torch.arange(ids.shape[1], device=device).expand_as(ids), None)
    exact = by_transformers(ExportDtype.fp32)

    def error(logits: torch.Tensor) -> float:
        return float((logits[..., : exact.shape[-1]].double() - exact).norm() / exact.norm())

    names = sorted({type(module).__name__ for module in core.modules() if type(module).__name__.startswith("TE")})
    result = {"megatron": error(found), "transformers": error(by_transformers(ExportDtype.bf16))}
    print(json.dumps({**result, "layers": names, "device": str(found.device)}))


if __name__ == "__main__":
    main()
