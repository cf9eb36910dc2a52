"""Losses of candidates after actual pruning: python -m tests.helpers.candidate_losses RESOLVED.YAML

For each row of the search's table, prints a JSON line: the loss that the search found, and that of the model which
ModelOpt returns, on the same held-out sequences (nats per token).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(config: Path) -> None:
    from prune_distill.nemo import backend

    backend.activate()
    from prune_distill.config.load import load_resolved
    from prune_distill.data.folder import DataFolder
    from prune_distill.model.student import AXES
    from prune_distill.nemo import nemo_api
    from prune_distill.pipeline.artifact import locate
    from prune_distill.pruning.cutting import complete_sizes, cut
    from prune_distill.pruning.importance import Importance
    from prune_distill.pruning.losses import compute_logits, cross_entropy, held_out_batches

    cfg = load_resolved(config)
    located = locate(cfg)
    assert cfg.prune.budget is not None
    inputs = located["search"].inputs
    scores = Importance.load(inputs["importance"])
    batches = held_out_batches(DataFolder.read(inputs["data"]), cfg.prune, cfg.prune.budget.samples, "cpu")
    table = json.loads((located["search"].folder / "candidates.json").read_text())
    for row in table["candidates"]:
        model, trainer = nemo_api.restore(inputs["teacher"], modelopt_spec=True)
        cut(model, complete_sizes({axis: row[axis] for axis in AXES[1:]}, model.config), row["drop_layers"], scores)
        core = nemo_api.core_model(model).eval()
        total = 0.0
        for batch in batches:
            logits = compute_logits(core, batch[:, :-1].contiguous())
            assert logits is not None
            total += cross_entropy(logits, batch[:, 1:])
        tokens = sum(batch[:, 1:].numel() for batch in batches)
        params = nemo_api.count_parameters(core)
        print(json.dumps({"found": row["loss"], "cut": total / tokens, "params": [row["params"], params]}), flush=True)
        del trainer


if __name__ == "__main__":
    main(Path(sys.argv[1]))
