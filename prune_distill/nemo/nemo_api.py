"""NeMo, Megatron-Core and ModelOpt for the stages: load and restore models, make trainers, check checkpoints.

Upstream's quirks are handled here, each with the upstream file and line. Import this module after
`backend.activate()`; the runner calls that before it imports a stage.
"""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from nemo import lightning as nl
from nemo.collections import llm
from nemo.collections.common.tokenizers.huggingface import auto_tokenizer
from nemo.collections.llm.inference.base import _setup_trainer_and_restore_model
from nemo.collections.llm.modelopt.model_utils import _set_gpt_mamba_modelopt_spec
from nemo.lightning.ckpt_utils import ckpt_to_context_subdir
from nemo.lightning.io.artifact import file as file_artifacts
from nemo.lightning.io.pl import ckpt_to_weights_subdir
from torch.distributed.checkpoint import FileSystemReader

from prune_distill.data.folder import DataFolder
from prune_distill.data.hf_tokenizer import load_tokenizer
from prune_distill.errors import InputError
from prune_distill.model.hf_tokenizer import faults as tokenizer_faults
from prune_distill.nemo import backend
from prune_distill.nemo.precision import model_precision, precision_plugin
from prune_distill.nemo.saved_records import read_records
from prune_distill.pipeline.names import TOKENIZER
from prune_distill.pipeline.stage_main import rank, world_size
from prune_distill.schema import Fp8, Parallel, Precision

log = logging.getLogger("recipes.nemo_api")


class _ContextTokenizers:
    """Replaces transformers' AutoTokenizer where NeMo loads the tokenizer in a checkpoint's `context/`
    (nemo/collections/common/tokenizers/huggingface/auto_tokenizer.py, _initialize_tokenizer)."""

    upstream = auto_tokenizer.AUTOTOKENIZER

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, **options: Any) -> Any:
        folder = Path(pretrained_model_name_or_path)
        # Other arguments come from checkpoints that this project did not write.
        if folder.is_dir() and options.keys() <= {"use_fast", "trust_remote_code"} and not options["trust_remote_code"]:
            return load_tokenizer(folder)
        return cls.upstream.from_pretrained(pretrained_model_name_or_path, **options)


def _copy_artifact(source: Path | str, folder: Path | str, relative_folder: Path | str) -> Path:
    """Copy a file of a checkpoint's context, or a folder such as `additional_chat_templates`, which upstream
    cannot copy (nemo/lightning/io/artifact/file.py, copy_file)."""
    if not Path(source).is_dir():
        copied: Path = _upstream_copy(source, folder, relative_folder)
        return copied
    relative = Path(relative_folder, Path(source).name)
    shutil.copytree(source, Path(folder, relative))
    return relative


auto_tokenizer.AUTOTOKENIZER = _ContextTokenizers
_upstream_copy, file_artifacts.copy_file = file_artifacts.copy_file, _copy_artifact


def load_model(checkpoint: Path) -> llm.GPTModel:
    """Load the model that a checkpoint's `context/` describes, without weights, with this backend's settings.

    Raises:
        InputError: the folder is not a NeMo checkpoint, or its tokenizer cannot be read.
    """
    context = Path(ckpt_to_context_subdir(checkpoint))
    if not (context / "model.yaml").exists():
        raise InputError(f"{checkpoint} is not a NeMo checkpoint (no context/model.yaml)")
    # Otherwise the error is a traceback in Fiddle, which builds what the context describes.
    if (context / TOKENIZER).is_dir() and (found := tokenizer_faults(context / TOKENIZER)):
        raise InputError("; ".join(found))
    model = nl.io.load_context(context, subpath="model")
    if not isinstance(model, llm.GPTModel):
        raise InputError(f"{checkpoint} contains a {type(model).__name__}; use a GPT-like language model")
    configure(model.config)
    return model


def configure(config: Any) -> None:
    """Set the fields of a Megatron config that this backend requires, and enable the fused kernels.

    NeMo's configs of some families disable them (Qwen's: nemo/collections/llm/gpt/model/qwen3.py:46). The fused
    rotary embedding is one kernel instead of eight, and fused SwiGLU saves only its input for the backward pass, half
    of what `glu` saves (megatron/core/transformer/mlp.py:204, fusions/fused_bias_swiglu.py:SwiGLUFunction).
    """
    for name, value in backend.activate().model_config.items():
        setattr(config, name, value)
    config.apply_rope_fusion = not config.rotary_interleaved
    config.bias_activation_fusion = config.activation_func is torch.nn.functional.silu and config.gated_linear_unit


def make_trainer(
    parallel: Parallel,
    precision: Precision,
    ddp: DistributedDataParallelConfig | str,
    callbacks: list[Any] | None = None,
    strategy_options: dict[str, Any] | None = None,
    fp8: Fp8 | None = None,
    **options: Any,
) -> nl.Trainer:
    """Make a NeMo trainer over all ranks of torchrun.

    Args:
        ddp: Megatron's data-parallel settings, or "pytorch" without training.
        strategy_options: more arguments of `nl.MegatronStrategy`.
        options: more arguments of `nl.Trainer`.
    """
    # Lightning must expect the ranks that torchrun has launched.
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    strategy = nl.MegatronStrategy(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        # Experts are small, so they are distributed but not split.
        expert_tensor_parallel_size=1,
        sequence_parallel=parallel.sequence_parallel and parallel.tensor_model_parallel_size > 1,
        ddp=ddp,
        # Store the optimizer state in the shapes of the model, so that a run resumes on any layout. The default layout
        # also fails to load in fp32: its in-place copy into a leaf is not under no_grad
        # (megatron/core/optimizer/distrib_optimizer.py:928).
        ckpt_optim_fully_reshardable=True,
        # Transformer Engine's `_extra_state` entries depend on its version and on ModelOpt's layer spec. A missing
        # parameter is not an error either, so `check_parameters` follows every load.
        ckpt_load_strictness=StrictHandling.LOG_ALL,
        replace_progress_bar=False,
        **{"ckpt_async_save": False, **(strategy_options or {})},
    )
    trainer = nl.Trainer(
        accelerator=backend.activate().accelerator,
        devices=local_ranks,
        num_nodes=world_size() // local_ranks,
        strategy=strategy,
        plugins=precision_plugin(precision, fp8),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        **options,
    )
    # Not passed to the constructor: a checkpoint's context records its arguments, and NeMo only loads its own classes
    # and those of its libraries (nemo/lightning/io/mixin.py:50).
    trainer.callbacks.extend(callbacks or [])
    return trainer


def restore(
    checkpoint: Path,
    *,
    pipeline_model_parallel_size: int = 1,
    tensor_model_parallel_size: int = 1,
    precision: Precision | None = None,
    fp8: Fp8 | None = None,
    modelopt_spec: bool = False,
    **options: Any,
) -> tuple[llm.GPTModel, nl.Trainer]:
    """Load a model with its weights for forward passes, without optimizer and gradient buffers.

    Like `setup_trainer_and_restore_model_with_modelopt_spec` (nemo/collections/llm/modelopt/model_utils.py:118),
    which requires a GPU and bf16 regardless of the checkpoint.

    Args:
        pipeline_model_parallel_size: if it does not divide the layers, the last stage has more or fewer layers.
        precision: precision of the forward passes; None: that of the checkpoint.
        fp8: FP8 scales of the layers' products; None: no FP8.
        modelopt_spec: whether to use ModelOpt's layer spec, which pruning requires.
        options: more arguments of `nl.Trainer`.

    Raises:
        InputError: not a NeMo checkpoint, or a parameter of the model is missing.
    """
    model = load_model(checkpoint)
    if modelopt_spec:
        use_modelopt_spec(model.config)
    trainer = make_trainer(
        Parallel(tensor_model_parallel_size, pipeline_model_parallel_size, sequence_parallel=False),
        precision or model_precision(model.config),
        ddp="pytorch",
        strategy_options={
            "setup_optimizers": False,
            "ckpt_load_optimizer": False,
            "num_layers_in_last_pipeline_stage": _layers_in_last_stage(
                model.config.num_layers, pipeline_model_parallel_size
            ),
        },
        fp8=fp8,
        **options,
    )
    model.config.sequence_parallel = False
    del model.optim
    _setup_trainer_and_restore_model(checkpoint, trainer, model)
    trainer.strategy.restore_config = None  # a later setup must not load the weights again
    check_parameters(trainer.strategy.megatron_parallel.sharded_state_dict(), checkpoint)
    return model, trainer


def use_modelopt_spec(config: Any) -> None:
    """Set ModelOpt's layer spec, which has Megatron's own linear layers and separate norms.

    Checkpoints do not depend on it (megatron/core/post_training/modelopt/gpt/model_specs.py:64).
    """
    _set_gpt_mamba_modelopt_spec(config)


def _layers_in_last_stage(layers: int, stages: int) -> int | None:
    """Return the number of layers in the last pipeline stage, or None if all stages have the same number.

    All other stages must be equal (megatron/core/transformer/transformer_config.py:1085).
    """
    if layers % stages == 0:
        return None
    rounded_up = layers - (stages - 1) * -(-layers // stages)
    return rounded_up if rounded_up > 0 else layers - (stages - 1) * (layers // stages)


def match_tokenizer(checkpoint: Path, data: DataFolder) -> None:
    """Reject documents of another tokenizer, before any weight is read.

    Raises:
        InputError: states what differs.
    """
    model = load_model(checkpoint)
    pairs = {
        "entries of the vocabulary": (data.vocab_size, model.config.vocab_size),
        "end-of-document id": (data.eod_token, model.tokenizer.eos_id),
    }
    for what, (data_value, model_value) in pairs.items():
        if data_value != model_value:
            raise InputError(
                f"the documents in {data.folder} were prepared with another tokenizer: {what} {data_value}, but "
                f"{model_value} in the model; prepare them with the tokenizer of model.hf_path"
            )


def check_parameters(sharded_state_dict: dict[str, Any], checkpoint: Path) -> None:
    """Reject a checkpoint that lacks a parameter, which lenient loading would leave random, or that is damaged.

    Args:
        sharded_state_dict: Megatron's sharded state dict of the loaded model.

    Raises:
        InputError: names the parameters that are missing or damaged.
    """
    saved = dist_checkpointing.load_tensors_metadata(str(ckpt_to_weights_subdir(checkpoint, is_saving=False)))
    wanted = {value.key for value in nested_values(sharded_state_dict) if isinstance(value, ShardedTensor)}
    # Projections of the layer pairs are initialized randomly; checkpoints do not contain them.
    optional = ("_extra_state", "_loss_modules")
    missing = sorted(key for key in wanted if key not in saved and not any(part in key for part in optional))
    if missing:
        raise InputError(f"{checkpoint} lacks {len(missing)} parameters of the model, such as {missing[:3]}")
    check_bytes(checkpoint)


def check_bytes(checkpoint: Path) -> None:
    """Reject a checkpoint whose bytes have changed: torch writes CRCs but does not verify them.

    Each rank verifies a part of the saved objects.

    Raises:
        InputError: names the file and the tensor.
    """
    weights = Path(ckpt_to_weights_subdir(checkpoint, is_saving=False))
    places = FileSystemReader(weights).read_metadata().storage_data.items()
    for index, place in sorted(places, key=lambda item: (item[1].relative_path, item[1].offset))[
        rank() :: world_size()
    ]:
        for record in read_records(weights / place.relative_path, place.offset, place.length, index.fqn):
            record.check()


def load_parameters(model: Any, checkpoint: Path, trainer: nl.Trainer) -> None:
    """Load a checkpoint's weights into a Megatron model that is in use, on all ranks, as upstream's `teacher_provider`
    does for a new model (nemo/collections/llm/modelopt/distill/utils.py:137).

    Raises:
        InputError: the checkpoint lacks a parameter.
    """
    files = trainer.strategy.unwrapped_checkpoint_io
    metadata = files.load_content_metadata(str(checkpoint))
    sharded = model.sharded_state_dict(prefix="module.", metadata=metadata)
    check_parameters(sharded, checkpoint)
    loaded = trainer.strategy.checkpoint_io.load_checkpoint(
        str(checkpoint), {"state_dict": sharded}, strict=trainer.strategy.ckpt_load_strictness
    )
    # Not strict because of `_extra_state`; the parameters were checked above.
    model.load_state_dict(
        {name.removeprefix("module."): value for name, value in loaded["state_dict"].items()}, strict=False
    )
    # Otherwise the FP8 copies of the earlier weights would be used (megatron/core/transformer/module.py:90).
    model.set_is_first_microbatch()


def core_model(model: Any) -> Any:
    """Return Megatron's `GPTModel` inside the wrappers of NeMo, ModelOpt and the precision plugin."""
    while hasattr(model, "module"):
        model = model.module
    return model


def count_parameters(core: Any) -> int:
    """Count the parameters of a Megatron model over all pipeline and tensor-parallel ranks; shared ones count once."""
    unique = [p for p in core.parameters() if not getattr(p, "shared_embedding", False) or core.pre_process]
    if not torch.distributed.is_initialized():
        return sum(p.numel() for p in unique)
    local = sum(p.numel() for p in unique if param_is_not_tensor_parallel_duplicate(p))
    total = torch.tensor(local, device=backend.activate().device)
    torch.distributed.all_reduce(total)
    return int(total)


def number_layers(core: Any) -> None:
    """Mark each layer of a Megatron model with its number (from 1), which pruning preserves."""
    for layer in core.decoder.layers:
        layer.number_before_pruning = layer.layer_number


def kept_layers(core: Any) -> list[int]:
    """Return the numbers that the layers of a pruned model had before pruning, over all ranks."""
    local = [layer.number_before_pruning for layer in core.decoder.layers]
    if not torch.distributed.is_initialized():
        return local
    gathered: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, local)
    return sorted({number for numbers in gathered for number in numbers})
