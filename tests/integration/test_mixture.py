"""An MoE model in all stages, and its distillation with expert parallelism."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from launch.planning.automatic import compose
from prune_distill.config.load import save_resolved
from prune_distill.pipeline.artifact import locate, read_manifest
from tests.helpers import tiny, tolerance

STEPS = 20
# All axes of MoE models: 3 layers to 2, 128 hidden channels to 64, 6 experts to 4 and their FFN from 128 to 64.
MIXTURE = (
    *("model.family=qwen3_moe", "model.shape.num_layers=3", "model.shape.num_moe_experts=6"),
    *("model.shape.moe_ffn_hidden_size=128", "model.shape.moe_router_topk=2", "model.demo.training.max_steps=30"),
    *("prune.num_layers=2", "prune.hidden_size=64", "prune.num_moe_experts=4", "prune.moe_ffn_hidden_size=64"),
    *(f"distill.max_steps={STEPS}", "distill.controls=[]"),
)
# The router's auxiliary loss is that of each sequence, and so the same in any micro batch on any rank.
TWO_RANKS = ("cluster.devices_per_node=2", "distill.parallel.expert_model_parallel_size=2")
LAYOUTS = {
    "ep2": (*TWO_RANKS, "distill.micro_batch_size=2"),
    "ep2_cp2": (*TWO_RANKS, "distill.parallel.context_parallel_size=2"),
    "ep2_tp2": (*TWO_RANKS, "distill.parallel.tensor_model_parallel_size=2"),
}

# Sums in fp32 in another order: 1.5e-7 measured. The auxiliary loss is a third of the routers' gradients here.
SAME = 1e-5


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("mixture") / "run"
    tiny.launch(run_dir, *MIXTURE)
    return run_dir


def test_an_moe_model_passes_all_stages(finished: Path) -> None:
    report = tiny.report(finished)
    assert report["checks"]["import_max_abs_logit_diff"] < tolerance.LOGITS
    assert report["checks"]["export_max_abs_logit_diff"] < tolerance.LOGITS
    folder = finished / report["models"]["student"]["hf_path"]
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["Qwen3MoeForCausalLM"]
    sizes = ("num_hidden_layers", "hidden_size", "num_experts", "moe_intermediate_size", "num_experts_per_tok")
    assert [config[size] for size in sizes] == [2, 64, 4, 64, 2]
    assert all(0 < model["val_loss"] < math.log(tiny.SHAPE["vocab_size"]) for model in report["models"].values())
    located = tiny.stages(finished, *MIXTURE)
    manifest = read_manifest(located["prune"].folder)
    assert manifest is not None
    assert manifest["metrics"]["params_before"] == report["models"]["teacher"]["params"]
    assert manifest["metrics"]["params"] == report["models"]["student"]["params"]
    rows = json.loads((located["importance"].folder / "importance.json").read_text())["layers"]
    assert all(sum(row["expert_tokens"]) == 16 * 128 * 2 for row in rows)


def test_the_exported_moe_model_needs_no_code_of_this_repository(finished: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = finished / tiny.report(finished)["models"]["student"]["hf_path"]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        logits = model(**tokenizer("The import statement", return_tensors="pt")).logits
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_expert_parallel_ranks_give_the_losses_of_one(finished: Path, tmp_path: Path, layout: str) -> None:
    one = tiny.stages(finished, *MIXTURE)["distill"].folder
    run_dir = tiny.copy_run(finished, tmp_path / "run")
    tiny.launch(run_dir, *MIXTURE, *LAYOUTS[layout], "--until", "distill")
    folder = tiny.stages(run_dir, *MIXTURE)["distill"].folder
    assert tiny.losses(folder, STEPS) == pytest.approx(tiny.losses(one, STEPS), abs=tolerance.LOSS)
    assert tiny.validations(folder) == pytest.approx(tiny.validations(one), abs=tolerance.LOSS)


def test_the_routers_auxiliary_loss_is_added_once(finished: Path, tmp_path: Path) -> None:
    """By our loss as by upstream's: their first gradients are the same, and not those without it, or of twice it."""
    run_dir = tiny.copy_run(finished, tmp_path / "run")
    cfg = compose(tiny.overrides(run_dir, *MIXTURE))
    save_resolved(cfg, run_dir / "resolved.yaml")
    probe = ["tests.helpers.mixture_gradients", "distill", "--config", str(run_dir / "resolved.yaml")]
    done = subprocess.run(
        [sys.executable, "-m", *probe], env=tiny.environment(), capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((locate(cfg)["distill"].folder / "gradients.json").read_text())
    assert found["coefficient"] == 1e-3  # NeMo's Qwen3MoEConfig
    assert found["upstream"][""] < SAME
    assert found["upstream"]["router"] < SAME
    assert found["ours_without"]["router"] > 100 * SAME
    assert found["ours_doubled"]["router"] > 100 * SAME
