"""python -m recipes prepare_data --config RUN_DIR/resolved.yaml
python -m recipes.prepare_data --check FOLDER [--document N [--split validation]]

Convert documents to Megatron's indexed tokens, with the teacher's tokenizer. Several processes, on one node or on
several, share the work; an interrupted stage resumes with the missing shards. `--check` reads a prepared folder
and compares it with its recorded checksums; `--document` shows one document as text.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prune_distill.data.check import check_folder, document_text
from prune_distill.data.plan import local_files
from prune_distill.data.prepare import prepare
from prune_distill.errors import InputError
from prune_distill.model.huggingface import local_folder
from prune_distill.pipeline.run_arguments import InputPath, Metrics
from prune_distill.pipeline.stage_main import command_line
from prune_distill.schema import DataConfig, RunConfig
from prune_distill.schema.phases import training_tokens

log = logging.getLogger("recipes.prepare")


@dataclass(frozen=True)
class Inputs:
    """Tokenizers and documents.

    Attributes:
        tokenizer: Hugging Face folder or Hub id of the teacher.
        documents: files of each source by name, and of `validation`, if it has its own.
        source_tokenizer: tokenizer of sources that contain ids.
    """

    tokenizer: Path | str
    documents: dict[str, InputPath]
    source_tokenizer: Path | str | None = None


def run(cfg: RunConfig, inputs: Inputs, out: Path) -> Metrics:
    """Output: `shards/`, `validation.{bin,idx}`, and `data.json`, which lists them."""
    tokenizer = local_folder(inputs.tokenizer, cfg.model.revision, weights=False)
    folder = prepare(
        cfg.data,
        {name: local_files(paths) for name, paths in inputs.documents.items()},
        tokenizer,
        out,
        cfg.seed,
        _source_tokenizer(inputs.source_tokenizer),
    )
    for warning in describe_losses(folder.lines, cfg.data):
        log.warning("%s", warning)
    if repeated := describe_repetition(folder.train_tokens, training_tokens(cfg.distill)):
        log.warning("%s", repeated)
    return {
        "train_documents": folder.train_documents,
        "train_tokens": folder.train_tokens,
        "validation_documents": folder.validation_documents,
        "validation_tokens": folder.validation_tokens,
        "sources": folder.sources,
        "worst_bad_share": folder.worst_bad_share,
        **folder.lines,
    }


def describe_losses(lines: Mapping[str, Any], data: DataConfig) -> Iterator[str]:
    """Yield warnings of the records and documents that are not read, or not whole, from the counts of `Lines`."""
    if lines["bad"]:
        yield f"{lines['bad']:,} of {lines['lines']:,} lines are invalid (the first: {lines['first_bad']})"
    if lines["too_long"]:
        yield (
            f"{lines['too_long']:,} documents are longer than data.max_document_tokens={data.max_document_tokens}"
            f" (data.long_documents={data.long_documents.value})"
        )
    if others := lines["other_fields"]:
        fields = ", ".join(f"{name} in {count:,} conversations" for name, count in sorted(others.items()))
        yield f"messages have fields that a chat template may not read: {fields}"
    if lines["dropped"]:
        yield f"{lines['dropped']:,} documents are dropped: too long, or none of their learned tokens is left"


def describe_repetition(available: int, read: int) -> str | None:
    """Return a warning if the distillation reads documents more than once; None: there are enough.

    Args:
        available: tokens of the training documents; `read`: tokens of all steps of the distillation.
    """
    if read <= available:
        return None
    return (
        f"distillation reads {read:,} tokens, but there are {available:,}: each document is read {read / available:.1f}"
        " times; add documents, or lower distill.max_steps"
    )


def _source_tokenizer(source: Path | str | None) -> Path | None:
    try:
        return None if source is None else local_folder(source, None, weights=False, model=False)
    except InputError as fault:
        raise InputError(f"data.source_tokenizer={source}: {fault}") from fault


def check(arguments: argparse.Namespace) -> None:
    """Check a prepared folder, or show a document. Raises: InputError, with all faults."""
    if arguments.document is None:
        print(check_folder(arguments.check))
    else:
        print(document_text(arguments.check, arguments.split, arguments.document))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", required=True, type=Path, metavar="FOLDER", help="RUN_DIR/prepare_data-*")
    parser.add_argument("--document", type=int, metavar="N", help="show document N, counted from 0")
    parser.add_argument("--split", choices=["train", "validation"], default="train", help="split of the document")
    with command_line():
        check(parser.parse_args())


if __name__ == "__main__":
    main()
