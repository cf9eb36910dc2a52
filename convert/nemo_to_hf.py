"""python -m convert.nemo_to_hf --config RUN_DIR/resolved.yaml

The run's NeMo checkpoints (pruned, student, controls) become Hugging Face folders that plain transformers loads.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from conf.schema import RunConfig
from recipes.runtime.stage_main import stage_main


def run(cfg: RunConfig, inputs: dict[str, Any], out: Path) -> dict[str, Any]:
    """Inputs: hf_model (the model they descend from) and a checkpoint a name. Output: a folder a name."""
    from recipes.runtime import backend

    backend.activate()
    from recipes.runtime.huggingface import export_model, local_folder

    reference = local_folder(inputs["hf_model"], cfg.model.revision, weights=False)
    checkpoints = {name: path for name, path in inputs.items() if name != "hf_model"}
    for name, checkpoint in checkpoints.items():
        if not (out / name).exists():
            export_model(checkpoint, reference, out / name)
    return {"models": sorted(checkpoints)}


if __name__ == "__main__":
    stage_main(run, "nemo_to_hf")
