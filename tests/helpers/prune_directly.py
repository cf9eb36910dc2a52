"""Compare with ModelOpt called directly: python -m tests.helpers.prune_directly TEACHER IMPORTANCE OUT JOB [...]

Started by torchrun where the teacher is to be spread over pipeline stages. A job is a JSON object: the sizes as
ModelOpt takes them and, by `drop_layers`, the layers to drop. Prints a JSON line a job: the names of the tensors that
differ, the layers that are kept, and how many tensors were compared.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any


def compare(teacher: Path, importance: Path, out: Path, jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    from prune_distill.nemo import backend

    backend.activate()
    import modelopt.torch.prune as mtp
    import torch

    from prune_distill.nemo import nemo_api
    from prune_distill.pipeline.stage_main import world_size
    from prune_distill.pruning.cutting import cut
    from prune_distill.pruning.importance import Importance

    scores = Importance.load(importance)
    ids = torch.randint(517, (2, 64), generator=torch.Generator().manual_seed(0))

    def pruned(job: dict[str, Any], directly: bool) -> tuple[dict[str, Any], list[int]]:
        sizes = {name: value for name, value in job.items() if name != "drop_layers"}
        model, trainer = nemo_api.restore(teacher, pipeline_model_parallel_size=world_size(), modelopt_spec=True)
        core = nemo_api.core_model(model)
        nemo_api.number_layers(core)
        if not directly:
            cut(model, sizes, job.get("drop_layers", ()), scores)
        else:
            if sizes:
                config = {"forward_loop": lambda _: None, "scores_path": str(out / "scores.pt")}
                mtp.prune(
                    model, mode="mcore_minitron", constraints={"export_config": sizes}, dummy_input=None, config=config
                )
            if job.get("drop_layers"):
                mtp.plugins.drop_mcore_language_model_layers(model, layers_to_drop=job["drop_layers"])
        state = {name: value.clone() for name, value in core.state_dict().items() if torch.is_tensor(value)}
        kept = nemo_api.kept_layers(core)
        # A pruned model still runs.
        from prune_distill.pruning.losses import compute_logits

        logits = compute_logits(core.eval(), ids)
        assert logits is None or torch.isfinite(logits).all()
        del trainer
        return state, kept

    _write_scores(teacher, scores, out / "scores.pt")
    found = []
    for job in jobs:
        (ours, kept), (theirs, wanted) = pruned(job, directly=False), pruned(job, directly=True)
        differing = [name for name in ours if name not in theirs or not torch.equal(ours[name], theirs[name])]
        missing = [name for name in theirs if name not in ours]
        found.append({"differ": differing + missing, "kept": kept, "wanted": wanted, "tensors": len(ours)})
    return found


def _write_scores(teacher: Path, scores: Any, path: Path) -> None:
    """The same scores in ModelOpt's own form, one dictionary a pipeline stage."""
    import torch

    from prune_distill.nemo import nemo_api
    from prune_distill.pipeline.stage_main import rank, world_size
    from prune_distill.pruning.search_space import convert_to_search_space, dynamic_core, restore_scores

    model, trainer = nemo_api.restore(teacher, pipeline_model_parallel_size=world_size(), modelopt_spec=True)
    convert_to_search_space(model)
    restore_scores(scores, dynamic_core(model))
    activations, layers = dynamic_core(model).get_activations_and_layer_scores()
    if rank() == 0:
        torch.save({"activations_per_rank": activations, "layer_scores": layers}, path)
    torch.distributed.barrier()
    del trainer


if __name__ == "__main__":
    teacher, importance, out, *jobs = sys.argv[1:]
    for line in compare(Path(teacher), Path(importance), Path(out), [json.loads(job) for job in jobs]):
        # In a single write: ranks write to the same pipe.
        os.write(1, json.dumps({"rank": int(os.environ.get("RANK", "0")), **line}).encode() + b"\n")
