"""Logits of many pairs in one process, as NeMo takes 10 s to import: python -m tests.helpers.parity FOLDER FOLDER ...

Prints a line of JSON a pair: the second folder, the largest difference, the largest logit, top-1 agreement.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main() -> None:
    from prune_distill.nemo import backend

    backend.activate()
    import torch

    from convert.parity import compare_logits

    # More tokens than the window of the one model that has a window.
    ids = torch.randint(517, (2, 96), generator=torch.Generator().manual_seed(0))
    for first, second in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
        found = compare_logits(Path(first), Path(second), ids.numpy())
        print(json.dumps([second, found.max_abs_diff, found.largest, found.top1_agreement]))


if __name__ == "__main__":
    main()
