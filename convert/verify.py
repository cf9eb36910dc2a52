"""python -m recipes verify --config RUN_DIR/resolved.yaml
python -m convert.verify FOLDER FOLDER [--text FILE] [--no-logits] [--digests]

Whether two folders hold the same model, each a Hugging Face model or a NeMo checkpoint: tensor by tensor, and by their
logits on the same tokens.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert import families
from convert.exporting import carried_files, is_checkpoint, open_tensors
from convert.stored import StoredTensor, blocks, copy_threads
from convert.trust import refuse_code
from prune_distill.data.folder import DataFolder
from prune_distill.data.hf_tokenizer import load_tokenizer
from prune_distill.errors import InputError
from prune_distill.model.huggingface import local_folder
from prune_distill.nemo import backend, hf_models
from prune_distill.pipeline.run_arguments import Metrics
from prune_distill.pipeline.stage_main import command_line
from prune_distill.schema import ExportDtype, RunConfig

log = logging.getLogger("convert.verify")
# torch and NeMo are imported in functions: comparing the tensors alone needs neither.

# Share of the largest logit by which twins may differ. On a CPU they differ by the order of their sums alone (1e-6 of
# it); on a GPU Transformer Engine multiplies fp32 as TF32, whose step is 1e-3. A wrong tensor costs more than a tenth.
LARGEST_SHARE = 0.05
EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class Inputs:
    """Prepared data, and both formats of the teacher (stage verify_import) or the student (stage verify)."""

    data: Path
    teacher_hf: Path | str | None = None
    teacher_nemo: Path | None = None
    student_hf: Path | None = None
    student_nemo: Path | None = None


def run(cfg: RunConfig, inputs: Inputs, out: Path) -> Metrics:
    """Metrics: the largest differences."""
    import torch  # this module is imported where PyTorch is not needed

    data = DataFolder.read(inputs.data)
    tokens = min(cfg.evaluate.verify_tokens, data.validation_tokens - 1)
    ids = torch.from_numpy(data.validation_sequences(tokens)[:1, :-1])
    metrics: Metrics = {"tokens": tokens}
    pairs = {
        "import": (inputs.teacher_hf, cfg.model.revision, inputs.teacher_nemo),
        "export": (inputs.student_hf, None, inputs.student_nemo),
    }
    for check, (source, revision, checkpoint) in pairs.items():
        if source is None or checkpoint is None:
            continue
        parity = compare_logits(local_folder(source, revision, weights=True), checkpoint, ids)
        metrics[f"{check}_max_abs_logit_diff"] = parity.max_abs_diff
        metrics[f"{check}_top1_agreement"] = parity.top1_agreement
        metrics[f"{check}_kl"] = parity.kl
    return metrics


@dataclass(frozen=True)
class Parity:
    """How two models' logits on the same tokens compare.

    Attributes:
        max_abs_diff: the largest difference of two logits.
        largest: the largest logit of the first model.
        top1_agreement: share of positions where both have the same likeliest token.
        kl: KL divergence of the second model's distribution from the first's, nats per token, the mean.
    """

    max_abs_diff: float
    largest: float
    top1_agreement: float
    kl: float

    def __str__(self) -> str:
        return (
            f"logits differ by at most {self.max_abs_diff:.2e} (the largest is {self.largest:.1f}), the likeliest token"
            f" is the same in {self.top1_agreement:.2%} of the positions, KL divergence {self.kl:.2e}"
        )


def compare_logits(first: Path, second: Path, ids: Any) -> Parity:
    """Compares two models' fp32 logits.

    Args:
        ids: `[b, s]` int64 token ids.

    Raises:
        InputError: they differ by more than rounding explains.
    """
    import torch.nn.functional as F  # this module is imported where PyTorch is not needed

    theirs, ours = (logits(folder, ids) for folder in (first, second))
    size = min(theirs.shape[-1], ours.shape[-1])  # a checkpoint's vocabulary may be padded
    theirs, ours = theirs[..., :size], ours[..., :size]
    log_p, log_q = (F.log_softmax(model.double(), -1) for model in (theirs, ours))
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    parity = Parity(
        (ours - theirs).abs().max().item(),
        theirs.abs().max().item(),
        (ours.argmax(-1) == theirs.argmax(-1)).float().mean().item(),
        kl.item(),
    )
    log.info("%s and %s: %s", first, second, parity)
    if not parity.max_abs_diff <= LARGEST_SHARE * parity.largest:
        raise InputError(f"{first} and {second} are not the same model: {parity}")
    return parity


def logits(folder: Path, ids: Any) -> Any:
    """A model's fp32 logits `[b, s, v]`: through transformers, or, of a checkpoint, through NeMo."""
    import torch  # this module is imported where PyTorch is not needed

    device = backend.activate().device
    if not is_checkpoint(folder):
        model = hf_models.load(folder, ExportDtype.fp32)
        with torch.inference_mode():
            return model(ids.to(device), use_cache=False).logits.cpu()
    from nemo.lightning.base import teardown  # only after backend.activate()

    from prune_distill.nemo import nemo_api  # only after backend.activate()

    model, trainer = nemo_api.restore(folder)
    core = nemo_api.core_model(model).eval().float()  # bf16 weights are fp32 numbers: nothing is lost
    with torch.inference_mode():
        positions = torch.arange(ids.shape[1], device=device).expand(ids.shape[0], -1)
        result = core(ids.to(device), positions, None).cpu()
    teardown(trainer)
    return result


def compare_tensors(first: Path, second: Path) -> tuple[dict[str, str], list[str]]:
    """Compares two models tensor by tensor, a checkpoint's as Hugging Face would have them.

    Returns:
        the digest of every tensor of the first, and what differs, by name.
    """
    # What a checkpoint is a checkpoint of, the other folder says, where it is one of Hugging Face.
    references = [other if not is_checkpoint(other) else None for other in (second, first)]
    ours, theirs = (open_tensors(folder, of) for folder, of in zip((first, second), references, strict=True))
    digests, others = digest(ours), digest(theirs)
    for one, other in ((digests, others), (others, digests)):
        # A tied model may have its output layer saved all the same.
        if OUTPUT not in other and one.get(OUTPUT) == one.get(EMBEDDING):
            one.pop(OUTPUT, None)
    differences = [f"{name} is only in {first}" for name in digests.keys() - others.keys()]
    differences += [f"{name} is only in {second}" for name in others.keys() - digests.keys()]
    for name in digests.keys() & others.keys():
        here, there = ours[name], theirs[name]
        if (here.dtype, here.shape) != (there.dtype, there.shape):
            differences.append(f"{name} is {here.dtype} {list(here.shape)} and {there.dtype} {list(there.shape)}")
        elif digests[name] != others[name]:
            differences.append(f"{name} holds other numbers")
    return digests, sorted(differences)


def digest(tensors: dict[str, StoredTensor]) -> dict[str, str]:
    """The BLAKE2b digest of every tensor's bytes, row by row."""

    def hash_tensor(tensor: StoredTensor) -> str:
        total = hashlib.blake2b(digest_size=16)
        for block in blocks(tensor):
            total.update(block)
        return total.hexdigest()

    with ThreadPoolExecutor(copy_threads()) as pool:
        return dict(zip(tensors, pool.map(hash_tensor, tensors.values()), strict=True))


def token_ids(folders: list[Path], text: Path | None, count: int) -> Any:
    """`[1, s]` ids: of a text, by the first Hugging Face folder's tokenizer, or random ones.

    Raises:
        InputError: no text, or no tokenizer or configuration that would load.
    """
    import torch  # this module is imported where PyTorch is not needed

    folder = next((folder for folder in folders if not is_checkpoint(folder)), None) or carried_files(folders[0])
    try:
        if text is None:
            vocabulary = families.read_config(folder)["vocab_size"]
            return torch.randint(vocabulary, (1, count), generator=torch.Generator().manual_seed(0))
        ids = load_tokenizer(folder)(text.read_text())["input_ids"][:count]
    except InputError:
        raise
    except Exception as error:  # transformers' own, of whatever a folder lacks
        raise InputError(f"no tokens can be had ({type(error).__name__}: {error}); see {text or folder}") from error
    if not ids:
        raise InputError(f"{text} holds no text")
    return torch.tensor([ids])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs=2, type=Path, metavar="FOLDER", help="a Hugging Face model or NeMo checkpoint")
    parser.add_argument("--text", type=Path, help="a text to compare logits on (random tokens)")
    parser.add_argument("--tokens", type=int, default=128, help="how many tokens of it (128)")
    parser.add_argument("--no-logits", action="store_true", help="compare the tensors alone, which loads no model")
    parser.add_argument("--digests", action="store_true", help="print every tensor's digest")
    parser.add_argument(
        "--trust-source", action="store_true", help="load a NeMo checkpoint that brings code of its own"
    )
    args = parser.parse_args()
    with command_line():
        sys.exit(verify(args))


def verify(args: argparse.Namespace) -> int:
    """Prints what was found. Returns the exit status: 2 where the models differ."""
    first, second = args.folders
    if args.tokens < 1:
        raise InputError(f"--tokens {args.tokens}: at least one is needed to compare logits")
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
        parity = compare_logits(first, second, token_ids(args.folders, args.text, args.tokens))
        print(
            f"logits: max_abs_diff {parity.max_abs_diff:.3e}, top1_agreement {parity.top1_agreement:.4f},"
            f" kl {parity.kl:.3e}"
        )
    return 2 if differences else 0


if __name__ == "__main__":
    main()
