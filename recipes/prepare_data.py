"""python -m recipes.prepare_data --config RUN_DIR/resolved.yaml

JSONL documents become Megatron's indexed tokens, with the teacher's tokenizer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from conf.schema import RunConfig
from recipes.runtime.stage_main import stage_main


def run(cfg: RunConfig, inputs: dict[str, Any], out: Path) -> dict[str, Any]:
    """Inputs: tokenizer (a Hugging Face model), train and, where given, validation (JSONL files).

    Output: `train.{bin,idx}`, `validation.{bin,idx}`, `data.json`.
    """
    from recipes.runtime.huggingface import local_folder
    from recipes.runtime.tokenize import tokenize

    tokenizer = local_folder(inputs["tokenizer"], cfg.model.revision, weights=False)
    validation = _files(inputs["validation"]) if "validation" in inputs else None
    folder, lines = tokenize(cfg.data, _files(inputs["train"]), validation, tokenizer, out)
    return {
        "train_documents": folder.train_documents,
        "train_tokens": folder.train_tokens,
        "validation_documents": folder.validation_documents,
        "validation_tokens": folder.validation_tokens,
        "lines": lines.read,
        "empty_lines": lines.empty,
        "bad_lines": lines.bad,
        "first_bad_line": lines.first_bad,
    }


def _files(source: Path | tuple[Path, ...]) -> list[Path]:
    return [source] if isinstance(source, Path) else list(source)


if __name__ == "__main__":
    stage_main(run, "prepare_data")
