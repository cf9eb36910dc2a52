"""python -m convert.hf_to_nemo --config RUN_DIR/resolved.yaml

The teacher: a Hugging Face model becomes a NeMo checkpoint.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from conf.schema import RunConfig
from recipes.runtime.stage_main import stage_main


def run(cfg: RunConfig, inputs: dict[str, Any], out: Path) -> dict[str, Any]:
    """Inputs: hf_model (a folder or Hub id). Output: `nemo/` (context and weights)."""
    from recipes.runtime import backend

    backend.activate()
    from recipes.runtime.huggingface import import_model, local_folder

    source = local_folder(inputs["hf_model"], cfg.model.revision, weights=True)
    staging = out / "tokenizer"
    shutil.rmtree(out / "nemo", ignore_errors=True)
    import_model(source, cfg.model.family, out / "nemo", staging)
    shutil.rmtree(staging)
    return {"source": str(inputs["hf_model"]) if isinstance(inputs["hf_model"], str) else source.name}


if __name__ == "__main__":
    stage_main(run, "hf_to_nemo")
