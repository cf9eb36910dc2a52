"""python -m recipes hf_to_nemo --config RUN_DIR/resolved.yaml
python -m convert.hf_to_nemo --hf-model FOLDER_OR_HUB_ID --out FOLDER

The teacher: a Hugging Face model becomes a NeMo checkpoint, by copying bytes. No model is built.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from convert import families, pickled_files, safetensors_files
from convert.files import replaced
from convert.nemo_context import model_call, write_context
from convert.stored import StoredTensor, blocks, copy_threads, report_nonfinite
from convert.torch_dist import TorchDistWriter
from convert.torch_save import TORCH_TYPES
from prune_distill.errors import InputError
from prune_distill.model.hf_config import HfConfig
from prune_distill.model.hf_weights import expected_shapes, tensor_faults
from prune_distill.model.huggingface import copy_side_files, hub_commit, local_folder
from prune_distill.pipeline.names import CONTEXT, NEMO, TOKENIZER, WEIGHTS
from prune_distill.pipeline.run_arguments import Metrics
from prune_distill.pipeline.stage_main import command_line
from prune_distill.schema import RunConfig


@dataclass(frozen=True)
class Inputs:
    """The teacher's Hugging Face folder, or its Hub id."""

    hf_model: Path | str


def run(cfg: RunConfig, inputs: Inputs, out: Path) -> Metrics:
    """Output: `nemo/` (context and weights)."""
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
    """Writes a Hugging Face model as the NeMo checkpoint `checkpoint`, whole or not at all.

    Args:
        allow_pickle: whether `pytorch_model*.bin` will do where there are no safetensors.
        allow_nonfinite: whether weights may be NaN or infinite.
        checksum: whether the saved chunks carry their CRC-32.

    Returns:
        `hub_commit`, the exact revision of a model from the Hub, or None.

    Raises:
        InputError: the model cannot be had, is damaged, or cannot be represented in NeMo.
    """
    source = local_folder(hf_model, revision, weights=True, allow_pickle=allow_pickle)
    with replaced(checkpoint, source) as partial:
        write_checkpoint(source, partial, allow_nonfinite=allow_nonfinite, checksum=checksum)
    return {"hub_commit": hub_commit(source)}


def write_checkpoint(source: Path, checkpoint: Path, *, allow_nonfinite: bool, checksum: bool) -> None:
    """Writes `context/` and `weights/` into the empty folder `checkpoint`."""
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
    """The type of a folder's weights, in torch's terms, once they are known to be what its `config.json` describes.

    Raises:
        InputError: tensors that are missing, unknown, or not of the shape or type that they should be: all of them.
    """
    faults = tensor_faults(tensors, config)
    output, embedding = tensors.get("lm_head.weight"), tensors.get("model.embed_tokens.weight")
    if config.get("tie_word_embeddings", False) and output is not None and not _equal(output, embedding):
        faults.append("lm_head.weight is not model.embed_tokens.weight, as tie_word_embeddings=true would have it")
    if faults:
        raise InputError(f"{source} does not hold what its config.json describes: " + "; ".join(faults))
    return TORCH_TYPES[tensors["model.embed_tokens.weight"].dtype][0]


def _equal(first: StoredTensor, second: StoredTensor | None) -> bool:
    if second is None or (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    return all(ours == theirs for ours, theirs in zip(blocks(first), blocks(second), strict=True))


def write_weights(tensors: dict[str, StoredTensor], config: HfConfig, weights: Path, *, checksum: bool) -> bool:
    """Writes the folder `weights`: every NeMo tensor as the chunks that NeMo's importer would write.

    Returns:
        whether all weights are finite.
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
            # Empty without fp8, and so the same with Transformer Engine and without
            # (megatron/core/extensions/transformer_engine.py, _extra_state).
            owner = key.removesuffix(".weight")
            place = f"{'.'.join(map(str, index))}_{'.'.join(map(str, extents))}"
            writer.add_object(f"{owner}._extra_state/shard_{place}", [None])
    return writer.write(weights, COMMON, threads=copy_threads(), checksum=checksum)


# What NeMo reads of a checkpoint's common part besides the weights: nothing was trained yet.
COMMON: dict[str, object] = {
    "epoch": 0,
    "global_step": 0,
    "pytorch-lightning_version": "2.4.0",
    "state_dict": {},
    "loops": {},
    "callbacks": {},
    "optimizer_states": {},
    "lr_schedulers": [],
    # megatron/core/dist_checkpointing/serialization.py: how the layers' parts are named.
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
    parser.add_argument("--no-checksum", action="store_true", help="leave out the chunks' CRC-32")
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
