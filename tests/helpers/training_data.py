"""python -m tests.helpers.training_data OUT TOKENIZER SEQUENCE_LENGTH: samples of a data folder for training, as JSON.

As many samples as its tokens give, through the data module of the stages.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path


def main() -> None:
    from prune_distill.nemo import backend

    backend.activate()
    import torch
    from nemo.collections.common.tokenizers.huggingface.auto_tokenizer import AutoTokenizer

    from prune_distill.data.folder import DataFolder
    from prune_distill.nemo.datasets import make_data_module

    data, tokenizer, length = DataFolder.read(Path(sys.argv[1])), sys.argv[2], int(sys.argv[3])
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    steps = data.train_tokens // length // 4
    with tempfile.TemporaryDirectory() as folder:
        module = make_data_module(
            AutoTokenizer(tokenizer),
            data,
            Path(folder),
            seq_length=length,
            micro_batch_size=4,
            global_batch_size=4,
            num_workers=0,
            seed=1,
        )
        module.build(steps, steps, 1, 0)
        samples = [module._train_ds[number] for number in range(4 * steps)]
    columns = {key: torch.stack([sample[key] for sample in samples]).tolist() for key in ("tokens", "labels")}
    masks = torch.stack([sample["loss_mask"] for sample in samples]).int().tolist()
    print(json.dumps({**columns, "loss_mask": masks}))


if __name__ == "__main__":
    main()
