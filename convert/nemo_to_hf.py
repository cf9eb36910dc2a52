"""python -m convert.nemo_to_hf --config RUN_DIR/resolved.yaml
python -m convert.nemo_to_hf --checkpoint FOLDER --hf-model FOLDER_OR_HUB_ID --out FOLDER

The run's NeMo checkpoints (pruned, student, controls) become Hugging Face folders that plain transformers loads.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from conf.schema import RunConfig
from recipes.runtime.stage_main import command_line, stage_main


def run(cfg: RunConfig, inputs: dict[str, Any], out: Path) -> dict[str, Any]:
    """Inputs: hf_model (the model they descend from) and a checkpoint a name. Output: a folder a name."""
    checkpoints = {name: path for name, path in inputs.items() if name != "hf_model"}
    for name, checkpoint in checkpoints.items():
        if not (out / name).exists():
            convert(checkpoint, inputs["hf_model"], cfg.model.revision, out / name)
    return {"models": sorted(checkpoints)}


def convert(checkpoint: Path, hf_model: Path | str, revision: str | None, folder: Path) -> None:
    """Writes a NeMo checkpoint as the Hugging Face folder `folder`, whole or not at all.

    Args:
        hf_model: the model that the checkpoint descends from; configuration and tokenizer are taken from it.
    """
    from recipes.runtime import backend

    backend.activate()
    from recipes.runtime.huggingface import export_model, local_folder

    export_model(checkpoint, local_folder(hf_model, revision, weights=False), folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, type=Path, help="a NeMo checkpoint (its context is code)")
    parser.add_argument("--hf-model", required=True, help="the model that it descends from: a folder, or a Hub id")
    parser.add_argument("--revision", help="the Hub revision")
    parser.add_argument("--out", required=True, type=Path, help="the Hugging Face folder, replaced if it exists")
    args = parser.parse_args()
    with command_line():
        convert(args.checkpoint, args.hf_model, args.revision, args.out)


if __name__ == "__main__":
    if "--config" in sys.argv:
        stage_main(run, "nemo_to_hf")
    else:
        main()
