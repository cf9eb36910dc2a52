"""Pruning in rounds through the real command lines: prune, distill, prune the student, distill again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM

from prune_distill.pipeline.artifact import read_manifest
from tests.helpers import tiny

# The second layer first, then, of the three that are left, by importance; widths in either round.
ROUNDS = (
    "prune.rounds=[{steps: 2, drop_layers: [2], ffn_hidden_size: 128}]",
    *("prune.num_layers=2", "prune.hidden_size=64", "distill.warmup_steps=1"),
)


def test_each_round_prunes_the_student_of_the_previous_round(finished: Path, tmp_path: Path) -> None:
    run_dir = tiny.copy_run(finished, tmp_path / "run")
    tiny.launch(run_dir, *ROUNDS, "--until", "verify")
    located = tiny.stages(run_dir, *ROUNDS)

    def metrics(stage: str) -> dict[str, Any]:
        manifest = read_manifest(located[stage].folder)
        assert manifest is not None
        return manifest["metrics"]

    assert metrics("prune.round1")["kept_layers"] == [1, 3, 4]
    kept = metrics("prune")["kept_layers"]
    assert len(kept) == 2
    assert {*kept} < {1, 3, 4}
    assert metrics("prune")["params_before"] == metrics("prune.round1")["params"]
    assert metrics("distill.round1")["steps"] == 2
    # The teacher stays the original, and the student starts from that of the previous round.
    inputs = {
        name: json.loads((located[name].folder / "manifest.json").read_text())["inputs"]
        for name in ("distill.round1", "distill", "prune")
    }
    assert inputs["distill"]["teacher"] == inputs["distill.round1"]["teacher"]
    assert inputs["prune"]["teacher"]["path"].startswith("distill.round1-")
    model = AutoModelForCausalLM.from_pretrained(located["nemo_to_hf"].folder / "student")
    config = model.config
    assert (config.num_hidden_layers, config.hidden_size, config.intermediate_size) == (2, 64, 128)
    assert metrics("verify")["export_max_abs_logit_diff"] < 1e-4
