"""Compare a distilled student with fake quantizers, in Megatron, with the model that the stage quantize wrote.

python -m tests.helpers.fake_quantized CHECKPOINT QUANTIZED_FOLDER FORMAT: prints the largest difference of logits, and
the largest difference of the same checkpoint without fake quantizers.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from prune_distill.nemo import backend

GROUP = 32


def main() -> None:
    backend.activate()
    from prune_distill.distillation.fake_quantizers import FakeQuantization
    from prune_distill.nemo import nemo_api
    from prune_distill.nemo.forward import run_forward
    from prune_distill.quantization import reader
    from prune_distill.schema import QuantFormat

    checkpoint, folder = Path(sys.argv[1]), Path(sys.argv[2])
    model, _ = nemo_api.restore(checkpoint, modelopt_spec=True)
    core = nemo_api.core_model(model).eval()
    ids = torch.randint(3, 500, (2, 64), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = reader.load(folder)(ids).logits
    logits: list[torch.Tensor] = []
    run_forward(core, [ids], logits.append)
    FakeQuantization(QuantFormat(sys.argv[3]), GROUP).insert(core)
    run_forward(core, [ids], logits.append)
    plain, quantized = ((found[..., : expected.shape[-1]] - expected).abs().max().item() for found in logits)
    print(json.dumps({"quantized": quantized, "plain": plain}))


if __name__ == "__main__":
    main()
