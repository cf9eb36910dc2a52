"""python -m recipes nemo_to_hf --config RUN_DIR/resolved.yaml
python -m convert.nemo_to_hf --checkpoint FOLDER --out FOLDER [--hf-model FOLDER_OR_HUB_ID] [--dtype bf16]

Convert the run's NeMo checkpoints (pruned and student, or a control) to Hugging Face folders for plain transformers,
by copying bytes. No code that a checkpoint names is run, so checkpoints from untrusted sources are safe to convert.
"""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass
from pathlib import Path

from convert.exporting import export_model, find_carried_files
from prune_distill.config.values import describe_teachers
from prune_distill.model.huggingface import local_folder
from prune_distill.pipeline.run_arguments import Metrics
from prune_distill.pipeline.stage_main import command_line
from prune_distill.schema import ExportDtype, Loss, RunConfig

# Models that are trained without a teacher.
WITHOUT_TEACHER = ("ce", "scratch", "corrected_teacher")


@dataclass(frozen=True)
class Inputs:
    """NeMo checkpoints by name, and the Hugging Face folder or Hub id of the model from which they descend."""

    hf_model: Path | str
    checkpoints: dict[str, Path]


def run(cfg: RunConfig, inputs: Inputs, out: Path) -> Metrics:
    """Output: a Hugging Face folder per checkpoint, with its name."""
    source = local_folder(inputs.hf_model, cfg.model.revision, weights=False)
    base = cfg.model.hf_path or cfg.model.name
    for name, checkpoint in inputs.checkpoints.items():
        if (out / name).exists():  # complete: written by an earlier attempt
            continue
        export_model(
            checkpoint,
            source,
            out / name,
            cfg.convert.export_dtype.value,
            title=f"{cfg.name}: {name}",
            base=base,
            note=_describe_loss(cfg, name),
            allow_nonfinite=cfg.convert.allow_nonfinite,
        )
    return {"models": sorted(inputs.checkpoints)}


def _describe_loss(cfg: RunConfig, name: str) -> str:
    distill, teachers = cfg.distill, describe_teachers(cfg, past=True)
    if name in WITHOUT_TEACHER:
        distill, teachers = dataclasses.replace(distill, loss=Loss.ce), ""
    alone = ", without a teacher" if distill.loss is Loss.ce else ""
    return f"The training's loss was {distill.loss_in_words}{alone}. {teachers}".rstrip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, type=Path, help="a NeMo checkpoint")
    parser.add_argument(
        "--hf-model",
        help="folder or Hub id of the model from which it descends, for its configuration and tokenizer"
        " (default: those inside the checkpoint)",
    )
    parser.add_argument("--revision", help="the Hub revision")
    parser.add_argument("--out", required=True, type=Path, help="the Hugging Face folder, replaced if it exists")
    types = [dtype.value for dtype in ExportDtype]
    parser.add_argument("--dtype", default="bf16", choices=types, help="the weights' type (bf16)")
    help_text = "accept weights that are NaN or infinite, or become infinite in that type"
    parser.add_argument("--allow-nonfinite", action="store_true", help=help_text)
    args = parser.parse_args()
    with command_line():
        if args.hf_model is None:
            source = find_carried_files(args.checkpoint)
        else:
            source = local_folder(args.hf_model, args.revision, weights=False)
        base = args.hf_model or "a model whose name the checkpoint does not record"
        allow = args.allow_nonfinite
        title = args.out.name
        export_model(args.checkpoint, source, args.out, args.dtype, title=title, base=base, allow_nonfinite=allow)


if __name__ == "__main__":
    main()
