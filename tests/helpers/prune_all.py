"""Checkpoints pruned by ModelOpt, many in one process: python -m tests.helpers.prune_all CHECKPOINT OUT SIZES [...]"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def prune_all(jobs: list[tuple[Path, Path, dict[str, int]]]) -> None:
    """Prune each checkpoint to the given sizes, with activations on random tokens.

    `recipes.prune` would reject these untrained teachers.
    """
    from prune_distill.nemo import backend

    backend.activate()
    import modelopt.torch.prune as mtp
    import torch
    from nemo.collections.llm.modelopt.prune.pruner import save_pruned_model
    from nemo.lightning.base import teardown

    from prune_distill.nemo import nemo_api

    ids = torch.randint(517, (2, 64), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(64).expand(2, -1)
    for checkpoint, out, sizes in jobs:
        model, trainer = nemo_api.restore(checkpoint, modelopt_spec=True)
        core = nemo_api.core_model(model)

        def calibrate(_: object, core: torch.nn.Module = core) -> None:
            with torch.no_grad():
                core.eval()(ids, positions, None)

        constraints = {"export_config": sizes}
        config = {"forward_loop": calibrate}
        mtp.prune(model, mode="mcore_minitron", constraints=constraints, dummy_input=None, config=config)
        save_pruned_model(trainer, str(out))
        teardown(trainer)


if __name__ == "__main__":
    values = sys.argv[1:]
    prune_all(
        [
            (Path(a), Path(b), json.loads(sizes))
            for a, b, sizes in zip(values[::3], values[1::3], values[2::3], strict=True)
        ]
    )
