"""python -m recipes verify --config RUN_DIR/resolved.yaml
python -m convert.verify FOLDER FOLDER [--text FILE] [--no-logits] [--digests]

Check that two folders, each a Hugging Face model or a NeMo checkpoint, contain the same model: tensor by tensor, and by
their logits on the same tokens.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from convert.exporting import is_checkpoint, open_tensors
from convert.stored import StoredTensor, blocks, copy_threads
from convert.trust import refuse_code
from prune_distill.data.folder import DataFolder
from prune_distill.errors import InputError
from prune_distill.model.huggingface import local_folder
from prune_distill.nemo import backend
from prune_distill.pipeline.run_arguments import Metrics
from prune_distill.pipeline.stage_main import command_line
from prune_distill.schema import RunConfig

log = logging.getLogger("convert.verify")
EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class Inputs:
    """Prepared data, and both formats of an imported model (stage verify_import) or the student (stage verify)."""

    data: Path
    teacher_hf: Path | str | None = None
    teacher_nemo: Path | None = None
    student_hf: Path | None = None
    student_nemo: Path | None = None


def run(cfg: RunConfig, inputs: Inputs, out: Path) -> Metrics:
    """Metrics: the largest differences."""
    from convert import parity  # imports PyTorch and NeMo, which a comparison of tensors does not need

    data = DataFolder.read(inputs.data)
    tokens = min(cfg.evaluate.verify_tokens, data.validation_tokens - 1)
    ids = data.validation_sequences(tokens)[:1, :-1]
    metrics: Metrics = {"tokens": tokens}
    pairs = {
        "import": (inputs.teacher_hf, cfg.model.revision, inputs.teacher_nemo),
        "export": (inputs.student_hf, None, inputs.student_nemo),
    }
    for check, (source, revision, checkpoint) in pairs.items():
        if source is None or checkpoint is None:
            continue
        found = parity.compare_logits(local_folder(source, revision, weights=True), checkpoint, ids)
        metrics[f"{check}_max_abs_logit_diff"] = found.max_abs_diff
        metrics[f"{check}_top1_agreement"] = found.top1_agreement
        metrics[f"{check}_kl"] = found.kl
    return metrics


def compare_tensors(first: Path, second: Path) -> tuple[dict[str, str], list[str]]:
    """Compare two models tensor by tensor, in Hugging Face's format.

    Returns:
        The digest of every tensor of the first, and descriptions of the differences, sorted by name.
    """
    # The reference of a checkpoint is the other folder, if that is a Hugging Face folder.
    references = [other if not is_checkpoint(other) else None for other in (second, first)]
    tensors, other_tensors = map(open_tensors, (first, second), references)
    digests, others = digest(tensors), digest(other_tensors)
    for one, other in ((digests, others), (others, digests)):
        # A tied model may contain its output layer nevertheless.
        if OUTPUT not in other and one.get(OUTPUT) == one.get(EMBEDDING):
            one.pop(OUTPUT, None)
    differences = [f"{name} is only in {first}" for name in digests.keys() - others.keys()]
    differences += [f"{name} is only in {second}" for name in others.keys() - digests.keys()]
    for name in digests.keys() & others.keys():
        left, right = tensors[name], other_tensors[name]
        if (left.dtype, left.shape) != (right.dtype, right.shape):
            differences.append(f"{name} is {left.dtype} {list(left.shape)} and {right.dtype} {list(right.shape)}")
        elif digests[name] != others[name]:
            differences.append(f"{name} has other values")
    return digests, sorted(differences)


def digest(tensors: dict[str, StoredTensor]) -> dict[str, str]:
    """Compute the BLAKE2b digest of every tensor's bytes."""

    def hash_tensor(tensor: StoredTensor) -> str:
        total = hashlib.blake2b(digest_size=16)
        for block in blocks(tensor):
            total.update(block)
        return total.hexdigest()

    with ThreadPoolExecutor(copy_threads()) as pool:
        return dict(zip(tensors, pool.map(hash_tensor, tensors.values()), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs=2, type=Path, metavar="FOLDER", help="a Hugging Face model or NeMo checkpoint")
    parser.add_argument("--text", type=Path, help="text to compare logits on (random tokens)")
    parser.add_argument("--tokens", type=int, default=128, help="number of tokens (128)")
    parser.add_argument("--no-logits", action="store_true", help="only compare tensors, without loading a model")
    parser.add_argument("--digests", action="store_true", help="print every tensor's digest")
    parser.add_argument("--trust-source", action="store_true", help="load a NeMo checkpoint that runs code on load")
    args = parser.parse_args()
    with command_line():
        sys.exit(verify(args))


def verify(args: argparse.Namespace) -> int:
    """Compare two folders and print the result. Returns the exit status: 2 if the models differ."""
    first, second = args.folders
    if args.tokens < 1:
        raise InputError(f"--tokens={args.tokens}: must be at least 1; raise it, or pass --no-logits")
    checkpoints = [folder for folder in (first, second) if is_checkpoint(folder)]
    if not args.no_logits and not args.trust_source:
        for folder in checkpoints:
            refuse_code(folder)
    digests, differences = compare_tensors(first, second)
    if args.digests:
        for name, value in digests.items():
            print(f"{value} {name}")
    print(f"tensors: {len(digests)}, " + (f"{len(differences)} differ" if differences else "all equal"))
    for difference in differences:
        print(f"  {difference}")
    if not args.no_logits:
        backend.activate()
        from convert import parity  # as in `run`, and only after backend.activate()

        found = parity.compare_logits(first, second, parity.token_ids(args.folders, args.text, args.tokens))
        print(
            f"logits: max_abs_diff {found.max_abs_diff:.3e}, top1_agreement {found.top1_agreement:.4f},"
            f" kl {found.kl:.3e}"
        )
    return 2 if differences else 0


if __name__ == "__main__":
    main()
