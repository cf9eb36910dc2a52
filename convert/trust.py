"""Check whether loading a NeMo checkpoint would run code other than NeMo's own model classes.

A checkpoint is code: `context/io.json` names functions that are called on load, and several of its files are pickles.
One that names only classes of the supported families and types that hold data is safe; others are rejected unless the
user trusts them.
"""

from __future__ import annotations

import io
import os
import re
from pathlib import Path

from convert.dcp_metadata import names_in_pickle
from convert.families import FAMILIES
from convert.nemo_context import pickled_files, references, trusts_remote_code
from convert.torch_dist import TorchDistReader
from prune_distill.errors import InputError
from prune_distill.pipeline.names import CONTEXT, WEIGHTS

# NeMo's modules of the supported families.
_MODULES = sorted({classes.model.module.rpartition(".")[2] for classes in FAMILIES.values()})
# Names in contexts of NeMo's importers, its trainer and the stages of this repository.
_CONTEXT = re.compile(
    rf"""
      builtins\.(dict|list|tuple)
    | fiddle\._src\.config\.(Config|Partial|BuildableTraverserMetadata)
    | megatron\.core\.dist_checkpointing\.validation\.StrictHandling\.\w+
    | megatron\.core\.distributed\.distributed_data_parallel_config\.DistributedDataParallelConfig
    | megatron\.core\.optimizer\.optimizer_config\.OptimizerConfig
    | megatron\.core\.transformer\.enums\.\w+
    | nemo\.collections\.common\.tokenizers\.huggingface\.auto_tokenizer\.AutoTokenizer
    | nemo\.collections\.llm\.fn\.activation\.squared_relu
    | nemo\.collections\.llm\.gpt\.data\.pre_training\.PreTrainingDataModule
    | nemo\.collections\.llm\.gpt\.model\.({"|".join(_MODULES)})\.\w*(Config|Model)\w*
    | nemo\.collections\.llm\.gpt\.model\.base\.(GPTConfig|GPTModel|default_layer_spec|gpt_(data|forward)_step)
    | nemo\.lightning\.io\.artifact\.hf_auto\.from_pretrained
    | nemo\.lightning\.io\.pl\.TrainerContext
    | nemo\.lightning\.pytorch\.optim\.lr_scheduler\.\w+Scheduler
    | nemo\.lightning\.pytorch\.optim\.megatron\.MegatronOptimizerModule
    | nemo\.lightning\.pytorch\.plugins\.mixed_precision\.MegatronMixedPrecision
    | nemo\.lightning\.pytorch\.strategies\.megatron_strategy\.MegatronStrategy
    | nemo\.lightning\.pytorch\.trainer\.Trainer
    | torch\.(bfloat16|float16|float32)
    | torch\.nn\.functional\.(silu|gelu)
    | transformers\.generation\.configuration_utils\.GenerationConfig
    """,
    re.VERBOSE,
)
# Names in Megatron's records of its save plans, and in torch's pickles of a tensor's layout. No other names of these
# modules: they have functions that read pickles, and give access to everything that they import.
_METADATA = re.compile(
    r"""
      megatron\.core\.dist_checkpointing\.strategies\.torch\.MCoreSavePlan
    | torch\.distributed\.checkpoint\.planner\.(BytesIOWriteData|SavePlan|TensorWriteData|WriteItem|WriteItemType)
    | torch\.distributed\.checkpoint\.metadata\._MEM_FORMAT_ENCODING
    | torch\.serialization\._get_layout
    | pathlib\.(_local\.)?PosixPath
    """,
    re.VERBOSE,
)
# Names in NeMo's pickles of a trainer next to a context.
_PLUGIN = re.compile(r"nemo\.lightning\.pytorch\.plugins\.mixed_precision\.(MegatronMixedPrecision|DtypeConfig)")
# Names in pickles, in addition to those that torch considers safe: Transformer Engine's state is stored as bytes.
_PICKLED = {"_io.BytesIO", "_codecs.encode"}


def refuse_code(checkpoint: Path) -> None:
    """Reject a NeMo checkpoint if loading it would run code that no model of the supported families needs.

    Raises:
        InputError: names that code, or the damaged file.
    """
    found = [f"context/io.json names {name}" for name in sorted(references(checkpoint)) if not _CONTEXT.fullmatch(name)]
    if trusts_remote_code(checkpoint):
        found.append("context/io.json asks for trust_remote_code")
    found += _pickled_context(checkpoint)
    # ModelOpt keeps its own state as a checkpoint within the weights.
    for folder, _, names in os.walk(checkpoint / WEIGHTS, followlinks=True):
        if ".metadata" in names:
            found += _pickled_tensors(Path(folder))
        for path in sorted(Path(folder, name) for name in names if name.endswith(".pt")):
            found += [f"{path.name} names {name}" for name in _unsafe_names(path, path.read_bytes())]
    if found:
        raise InputError(
            f"loading {checkpoint} would run code: {'; '.join(found[:5])}; if you trust its source, pass --trust-source"
        )


def _pickled_context(checkpoint: Path) -> list[str]:
    files = sorted(pickled_files(checkpoint))
    outside = [f"context/io.json reads {name!r} as a pickle" for name in files if Path(name).name != name]
    return outside + [
        f"context/{file} names {name}"
        for file in files
        if Path(file).name == file
        for name in sorted(names_in_pickle(checkpoint / CONTEXT / file))
        if not _PLUGIN.fullmatch(name)
    ]


def _pickled_tensors(weights: Path) -> list[str]:
    reader = TorchDistReader(weights)
    found = {f".metadata names {name}" for name in reader.other_names if not _METADATA.fullmatch(name)}
    for place in reader.objects:
        with place.file.open("rb") as file:
            file.seek(place.offset)
            names = _unsafe_names(place.file, file.read(place.length))
        found |= {f"{place.file.name} names {name}" for name in names if name not in _PICKLED}
    return sorted(found)


def _unsafe_names(path: Path, saved: bytes) -> list[str]:
    """List the names that `torch.load` would import, in addition to those that torch considers safe."""
    # Not at the top: most users of this module do not need torch.
    from torch.serialization import get_unsafe_globals_in_checkpoint

    try:
        return sorted(get_unsafe_globals_in_checkpoint(io.BytesIO(saved)))
    except Exception as error:  # damaged zips and pickles raise errors of any kind
        raise InputError(f"{path} is damaged or not written by torch.save ({type(error).__name__}: {error})") from error
