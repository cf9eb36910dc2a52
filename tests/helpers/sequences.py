"""python -m tests.helpers.sequences DATA HF_FOLDER: the held-out sequences and a model's loss on them, as JSON.

The sequences come from the data module of the stages, built after an attempt that ended while it wrote its index; the
loss from plain transformers.
"""

from __future__ import annotations

import json
import sys
import tempfile
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from tests.helpers.tiny import DISTILL


def main() -> None:
    from prune_distill.nemo import backend

    backend.activate()
    import torch
    from nemo.collections.common.tokenizers.huggingface.auto_tokenizer import AutoTokenizer
    from transformers import AutoModelForCausalLM

    from prune_distill.data.folder import DataFolder
    from prune_distill.nemo.datasets import make_data_module

    data, hf_folder = DataFolder.read(Path(sys.argv[1])), sys.argv[2]
    sizes = {key: DISTILL[key] for key in ("seq_length", "micro_batch_size", "global_batch_size", "num_workers")}
    with tempfile.TemporaryDirectory() as folder:
        module = make_data_module(AutoTokenizer(hf_folder), data, Path(folder), **sizes, seed=1234)
        sizes_of_training = (DISTILL["max_steps"], DISTILL["val_every_n_steps"], DISTILL["val_batches"], 0)
        with patch.object(np, "save", _truncation_error), suppress(KeyboardInterrupt):
            module.build(*sizes_of_training)
        left = [path.name for path in Path(folder).rglob("[!.]*.npy")]
        module.build(*sizes_of_training)
    samples = list(module._validation_ds)
    tokens, labels, mask = (torch.stack([s[key] for s in samples]) for key in ("tokens", "labels", "loss_mask"))
    first = DISTILL["val_batches"] * DISTILL["global_batch_size"]
    with torch.inference_mode():
        logits = AutoModelForCausalLM.from_pretrained(hf_folder, torch_dtype=torch.float32)(tokens[:first]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:first].flatten())
    ends = {"inputs": (tokens == data.eod_token).sum().item(), "labels": (labels == data.eod_token).sum().item()}
    print(json.dumps({"loss": loss.item(), "counted": mask.mean().item(), "ends": ends, "left": left}))


def _truncation_error(file: Any, array: Any, **_: Any) -> None:
    """`numpy.save` that ends after the header, in a file that it was given, or under the name that it was given."""
    with open(file, "wb") if isinstance(file, str) else nullcontext(file) as opened:
        np.lib.format.write_array_header_1_0(opened, np.lib.format.header_data_from_array_1_0(array))
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
