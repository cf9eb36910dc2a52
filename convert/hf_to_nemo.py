"""python -m recipes hf_to_nemo --config RUN_DIR/resolved.yaml
python -m convert.hf_to_nemo --hf-model FOLDER_OR_HUB_ID --out FOLDER

Convert a Hugging Face model to a NeMo checkpoint by copying bytes. No model is built.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from convert import families, pickled_files, safetensors_files
from convert.files import replace_folder
from convert.nemo_context import model_call, write_context
from convert.stored import StoredTensor, blocks, copy_threads, report_nonfinite
from convert.torch_dist import TorchDistWriter
from convert.torch_save import TORCH_TYPES
from prune_distill.errors import InputError
from prune_distill.model.hf_config import HfConfig
from prune_distill.model.hf_weights import expected_shapes, tensor_faults
from prune_distill.model.huggingface import copy_side_files, hub_commit, local_folder
from prune_distill.model.tokenizer_check import check_tokenizers
from prune_distill.pipeline.names import CONTEXT, NEMO, TOKENIZER, WEIGHTS
from prune_distill.pipeline.run_arguments import Metrics
from prune_distill.pipeline.stage_main import command_line
from prune_distill.schema import RunConfig


@dataclass(frozen=True)
class Inputs:
    """A Hugging Face folder, or a Hub id.

    Attributes:
        student_tokenizer: of a teacher, the tokenizer that its student has.
    """

    hf_model: Path | str
    student_tokenizer: Path | None = None


def run(cfg: RunConfig, inputs: Inputs, out: Path) -> Metrics:
    """Output: `nemo/` (context and weights)."""
    if inputs.student_tokenizer is not None:
        teacher = local_folder(inputs.hf_model, cfg.model.revision, weights=False)
        check_tokenizers(inputs.student_tokenizer, teacher, families.read_config(teacher)["vocab_size"])
    return convert(
        inputs.hf_model,
        cfg.model.revision,
        out / NEMO,
        allow_pickle=cfg.convert.allow_pickle,
        allow_nonfinite=cfg.convert.allow_nonfinite,
        checksum=cfg.convert.checksum,
    )


def convert(
    hf_model: Path | str,
    revision: str | None,
    checkpoint: Path,
    *,
    allow_pickle: bool = False,
    allow_nonfinite: bool = False,
    checksum: bool = True,
) -> dict[str, str | None]:
    """Convert a Hugging Face model to the NeMo checkpoint `checkpoint`, atomically.

    Args:
        allow_pickle: whether to read `pytorch_model*.bin` if there are no safetensors.
        allow_nonfinite: whether weights may be non-finite.
        checksum: whether to write the CRC-32 of each chunk.

    Returns:
        `hub_commit`, the exact revision of a model from the Hub, or None.

    Raises:
        InputError: the model is not available, damaged, or not supported by NeMo.
    """
    source = local_folder(hf_model, revision, weights=True, allow_pickle=allow_pickle)
    with replace_folder(checkpoint, source) as partial:
        write_checkpoint(source, partial, allow_nonfinite=allow_nonfinite, checksum=checksum)
    return {"hub_commit": hub_commit(source)}


def write_checkpoint(source: Path, checkpoint: Path, *, allow_nonfinite: bool, checksum: bool) -> None:
    """Write `context/` and `weights/` into the empty folder `checkpoint`."""
    config = families.read_config(source)
    family = families.FAMILIES[config["model_type"]]
    safe = any(source.glob("*.safetensors"))
    tensors = (safetensors_files if safe else pickled_files).read_folder(source)
    dtype = check(tensors, config, source)

    context = checkpoint / CONTEXT
    copy_side_files(source, context / TOKENIZER)
    write_context(context, model_call(family.model, families.nemo_config(config, dtype)))
    if not write_weights(tensors, config, checkpoint / WEIGHTS, checksum=checksum):
        report_nonfinite((tensors[name] for name in expected_shapes(config)), source, allow=allow_nonfinite)


def check(tensors: dict[str, StoredTensor], config: HfConfig, source: Path) -> str:
    """Check a folder's tensors against its `config.json`, and return torch's name of their type.

    Raises:
        InputError: tensors that are missing, unknown, or of another shape or type; lists all of them.
    """
    faults = tensor_faults(tensors, config)
    output, embedding = tensors.get("lm_head.weight"), tensors.get("model.embed_tokens.weight")
    if config.get("tie_word_embeddings", False) and output is not None and not _equal(output, embedding):
        faults.append("lm_head.weight differs from model.embed_tokens.weight despite tie_word_embeddings=true")
    if faults:
        raise InputError(f"{source} does not match its config.json: " + "; ".join(faults))
    return TORCH_TYPES[tensors["model.embed_tokens.weight"].dtype][0]


def _equal(first: StoredTensor, second: StoredTensor | None) -> bool:
    if second is None or (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    return all(block == other for block, other in zip(blocks(first), blocks(second), strict=True))


def write_weights(tensors: dict[str, StoredTensor], config: HfConfig, weights: Path, *, checksum: bool) -> bool:
    """Write the folder `weights`, with the same chunks as NeMo's importer.

    Returns:
        Whether all weights are finite.
    """
    heads = families.read_heads(config)
    writer = TorchDistWriter()
    for rule, index, names in families.parts(config):
        key = f"module.{rule.nemo}"
        chunks = rule.layout.to_nemo([tensors[name] for name in names], heads, key)
        matrix = (sum(chunk.shape[0] for chunk in chunks), *chunks[0].shape[1:])
        extents = (config["num_hidden_layers"], config.get("num_experts", 0))[: len(index)]
        row = 0
        for chunk in chunks:
            offsets = (*index, row, *(0 for _ in matrix[1:]))
            writer.add(key, (*extents, *matrix), offsets, chunk)
            row += chunk.shape[0]
        if rule.fused:
            # Empty without FP8, with or without Transformer Engine
            # (megatron/core/extensions/transformer_engine.py, _extra_state).
            owner = key.removesuffix(".weight")
            place = f"{'.'.join(map(str, index))}_{'.'.join(map(str, extents))}"
            writer.add_object(f"{owner}._extra_state/shard_{place}", [None])
    return writer.write(weights, COMMON, threads=copy_threads(), checksum=checksum)


# The common part of a checkpoint before any training.
COMMON: dict[str, object] = {
    "epoch": 0,
    "global_step": 0,
    "pytorch-lightning_version": "2.4.0",
    "state_dict": {},
    "loops": {},
    "callbacks": {},
    "optimizer_states": {},
    "lr_schedulers": [],
    # megatron/core/dist_checkpointing/serialization.py: the names of the layers' tensors.
    "content_metadata": {
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "distrib_optim_sharding_type": "dp_reshardable",
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hf-model", required=True, help="a Hugging Face model's folder, or its Hub id")
    parser.add_argument("--revision", help="the Hub revision")
    parser.add_argument("--out", required=True, type=Path, help="the NeMo checkpoint's folder, replaced if it exists")
    parser.add_argument("--allow-pickle", action="store_true", help="read pytorch_model*.bin, without running its code")
    parser.add_argument("--allow-nonfinite", action="store_true", help="accept weights that are NaN or infinite")
    parser.add_argument("--no-checksum", action="store_true", help="omit the CRC-32 of the chunks")
    args = parser.parse_args()
    with command_line():
        convert(
            args.hf_model,
            args.revision,
            args.out,
            allow_pickle=args.allow_pickle,
            allow_nonfinite=args.allow_nonfinite,
            checksum=not args.no_checksum,
        )


if __name__ == "__main__":
    main()
