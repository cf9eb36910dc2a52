"""python -m convert.hf_to_nemo --config RUN_DIR/resolved.yaml
python -m convert.hf_to_nemo --hf-model FOLDER_OR_HUB_ID --out FOLDER

The teacher: a Hugging Face model becomes a NeMo checkpoint.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any

from conf.schema import RunConfig
from recipes.runtime.stage_main import command_line, stage_main


def run(cfg: RunConfig, inputs: dict[str, Any], out: Path) -> dict[str, Any]:
    """Inputs: hf_model (a folder or Hub id). Output: `nemo/` (context and weights)."""
    convert(inputs["hf_model"], cfg.model.revision, out / "nemo")
    return {}


def convert(hf_model: Path | str, revision: str | None, checkpoint: Path) -> None:
    """Writes a Hugging Face model as the NeMo checkpoint `checkpoint`, whole or not at all."""
    from recipes.runtime import backend

    backend.activate()
    from recipes.runtime.huggingface import import_model, local_folder

    source = local_folder(hf_model, revision, weights=True)
    partial = checkpoint.with_name(f".partial.{checkpoint.name}")
    shutil.rmtree(partial, ignore_errors=True)
    import_model(source, partial / "nemo", staging=partial / "tokenizer")
    shutil.rmtree(checkpoint, ignore_errors=True)
    (partial / "nemo").rename(checkpoint)
    shutil.rmtree(partial)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hf-model", required=True, help="a Hugging Face model's folder, or its Hub id")
    parser.add_argument("--revision", help="the Hub revision")
    parser.add_argument("--out", required=True, type=Path, help="the NeMo checkpoint's folder, replaced if it exists")
    args = parser.parse_args()
    with command_line():
        convert(args.hf_model, args.revision, args.out)


if __name__ == "__main__":
    if "--config" in sys.argv:
        stage_main(run, "hf_to_nemo")
    else:
        main()
