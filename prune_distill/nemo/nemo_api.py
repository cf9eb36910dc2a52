"""NeMo, Megatron-Core and ModelOpt as the stages use them: models from checkpoints, trainers, restoring.

Upstream's quirks are met here and nowhere else, each with the place that shows it. Import this module after
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
from prune_distill.nemo.saved_records import read_records
from prune_distill.pipeline.stage_main import rank, world_size
from prune_distill.schema import Parallel, Precision

log = logging.getLogger("recipes.nemo_api")


class _ContextTokenizers:
    """Takes the place of transformers' AutoTokenizer where NeMo loads the tokenizer in a checkpoint's `context/`
    (nemo/collections/common/tokenizers/huggingface/auto_tokenizer.py, _initialize_tokenizer)."""

    upstream = auto_tokenizer.AUTOTOKENIZER

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, **options: Any) -> Any:
        folder = Path(pretrained_model_name_or_path)
        # Other arguments than these come from checkpoints that this project did not write.
        if folder.is_dir() and options.keys() <= {"use_fast", "trust_remote_code"} and not options["trust_remote_code"]:
            return load_tokenizer(folder)
        return cls.upstream.from_pretrained(pretrained_model_name_or_path, **options)


def _copy_artifact(source: Path | str, folder: Path | str, relative_folder: Path | str) -> Path:
    """Copies a file of a checkpoint's context, or a folder such as `additional_chat_templates`, which upstream
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
    """The model described by a checkpoint's `context/`, without weights, with this backend's settings.

    Raises:
        InputError: the folder holds no NeMo checkpoint, or one whose tokenizer cannot be read.
    """
    context = Path(ckpt_to_context_subdir(checkpoint))
    if not (context / "model.yaml").exists():
        raise InputError(f"{checkpoint} holds no NeMo checkpoint (no context/model.yaml)")
    # Or it would end in a traceback of Fiddle's, which calls what the context describes.
    if (context / "tokenizer").is_dir() and (found := tokenizer_faults(context / "tokenizer")):
        raise InputError("; ".join(found))
    model = nl.io.load_context(context, subpath="model")
    if not isinstance(model, llm.GPTModel):
        raise InputError(f"{checkpoint} holds a {type(model).__name__}; only GPT-like language models can be used")
    configure(model.config)
    return model


def configure(config: Any) -> None:
    """Sets on a Megatron config what this backend requires of every model, and the fused kernels.

    NeMo's configs of some families leave those off (Qwen's: nemo/collections/llm/gpt/model/qwen3.py:46). Fused, the
    rotary embedding is one kernel instead of eight, and SwiGLU keeps its input alone for the backward pass, half of
    what `glu` keeps (megatron/core/transformer/mlp.py:204, fusions/fused_bias_swiglu.py:SwiGLUFunction).
    """
    for name, value in backend.activate().model_config.items():
        setattr(config, name, value)
    config.apply_rope_fusion = not config.rotary_interleaved
    config.bias_activation_fusion = config.activation_func is torch.nn.functional.silu and config.gated_linear_unit


def precision_plugin(precision: Precision) -> nl.MegatronMixedPrecision:
    """NeMo's precision plugin. In bf16 the gradients are reduced in fp32, as in NeMo's own recipes."""
    dtype = torch.bfloat16 if precision is Precision.bf16 else torch.float32
    return nl.MegatronMixedPrecision(
        precision="bf16-mixed" if precision is Precision.bf16 else "32",
        params_dtype=dtype,
        pipeline_dtype=dtype,
        autocast_enabled=False,
        grad_reduce_in_fp32=True,
    )


def model_precision(config: Any) -> Precision:
    """The precision in which a checkpoint's weights are stored."""
    return Precision.bf16 if config.params_dtype is torch.bfloat16 else Precision.fp32


def make_trainer(
    parallel: Parallel,
    precision: Precision,
    ddp: DistributedDataParallelConfig | str,
    callbacks: list[Any] | None = None,
    strategy_options: dict[str, Any] | None = None,
    **options: Any,
) -> nl.Trainer:
    """A NeMo trainer over all the ranks that torchrun started.

    Args:
        ddp: Megatron's data-parallel settings, or "pytorch" where nothing is trained.
        strategy_options: further arguments of `nl.MegatronStrategy`.
        options: further arguments of `nl.Trainer`.
    """
    # What Lightning launches must be what torchrun launched (it sets both variables).
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    strategy = nl.MegatronStrategy(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        # Experts are small: whole ones are shared out, and none is cut.
        expert_tensor_parallel_size=1,
        sequence_parallel=parallel.sequence_parallel and parallel.tensor_model_parallel_size > 1,
        ddp=ddp,
        # The optimizer's state in the model's own shapes, so that a run resumes on any layout. The default layout also
        # fails to load in fp32: its in-place copy into a leaf is not under no_grad
        # (megatron/core/optimizer/distrib_optimizer.py:928).
        ckpt_optim_fully_reshardable=True,
        # Transformer Engine's `_extra_state` entries come and go with its version and with ModelOpt's layer spec; a
        # missing parameter would pass as well, so every load is followed by `check_parameters`.
        ckpt_load_strictness=StrictHandling.LOG_ALL,
        replace_progress_bar=False,
        **{"ckpt_async_save": False, **(strategy_options or {})},
    )
    trainer = nl.Trainer(
        accelerator=backend.activate().accelerator,
        devices=local_ranks,
        num_nodes=world_size() // local_ranks,
        strategy=strategy,
        plugins=precision_plugin(precision),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        **options,
    )
    # Not by the constructor: a checkpoint's context records its arguments, and NeMo reads no classes but its own and
    # its libraries' back (nemo/lightning/io/mixin.py:50).
    trainer.callbacks.extend(callbacks or [])
    return trainer


def restore(
    checkpoint: Path,
    *,
    pipeline_model_parallel_size: int = 1,
    tensor_model_parallel_size: int = 1,
    precision: Precision | None = None,
    modelopt_spec: bool = False,
    **options: Any,
) -> tuple[llm.GPTModel, nl.Trainer]:
    """A model with its weights, to run forward: no optimizer, no gradient buffers.

    The twin of `setup_trainer_and_restore_model_with_modelopt_spec` (nemo/collections/llm/modelopt/model_utils.py:118),
    which asks for a GPU and for bf16 whatever the checkpoint holds.

    Args:
        pipeline_model_parallel_size: need not divide the layers: the last stage then has more of them, or fewer.
        precision: to run in; None: that of the checkpoint.
        modelopt_spec: build the layers from ModelOpt's layer spec, which its pruning requires.
        options: further arguments of `nl.Trainer`.

    Raises:
        InputError: no NeMo checkpoint, or one without a parameter that the model has.
    """
    model = load_model(checkpoint)
    if modelopt_spec:
        _set_gpt_mamba_modelopt_spec(model.config)
    trainer = make_trainer(
        Parallel(tensor_model_parallel_size, pipeline_model_parallel_size, sequence_parallel=False),
        precision or model_precision(model.config),
        ddp="pytorch",
        strategy_options={
            "setup_optimizers": False,
            "ckpt_load_optimizer": False,
            "num_layers_in_last_pipeline_stage": _last_stage(model.config.num_layers, pipeline_model_parallel_size),
        },
        **options,
    )
    model.config.sequence_parallel = False
    del model.optim
    _setup_trainer_and_restore_model(checkpoint, trainer, model)
    trainer.strategy.restore_config = None  # the weights are in; a later setup must not load them again
    check_parameters(trainer.strategy.megatron_parallel.sharded_state_dict(), checkpoint)
    return model, trainer


def _last_stage(layers: int, stages: int) -> int | None:
    """The layers of the last pipeline stage where they cannot be shared out evenly, as all other stages have to be
    alike (megatron/core/transformer/transformer_config.py:1085); None where they can."""
    if layers % stages == 0:
        return None
    rounded_up = layers - (stages - 1) * -(-layers // stages)
    return rounded_up if rounded_up > 0 else layers - (stages - 1) * (layers // stages)


def match_tokenizer(checkpoint: Path, data: DataFolder) -> None:
    """Refuses documents that another tokenizer made, before any weight is read.

    Raises:
        InputError: names what differs.
    """
    model = load_model(checkpoint)
    pairs = {
        "entries of the vocabulary": (data.vocab_size, model.config.vocab_size),
        "end-of-document id": (data.eod_token, model.tokenizer.eos_id),
    }
    for what, (data_value, model_value) in pairs.items():
        if data_value != model_value:
            raise InputError(
                f"the documents in {data.folder} were made by another tokenizer than the model's: {what} "
                f"{data_value}, not {model_value}; prepare them with the tokenizer of model.hf_path"
            )


def match_vocabularies(student: Any, teacher: Any) -> None:
    """Refuses a teacher whose token ids or padded vocabulary are not the student's: upstream has no guard.

    Raises:
        InputError: names both sizes.
    """
    if student.vocab_size != teacher.vocab_size:
        raise InputError(
            f"the student's vocabulary has {student.vocab_size} entries, the teacher's {teacher.vocab_size}; their"
            " logits can't be compared: prune the student from this teacher"
        )


def match_precision(teacher: Any, precision: Precision) -> None:
    """Gives the teacher's config the types that the precision plugin gives the student's, which is all it sees."""
    for name, value in vars(precision_plugin(precision).dtype_config).items():
        if hasattr(teacher, name):
            setattr(teacher, name, value)


def check_parameters(sharded_state_dict: dict[str, Any], checkpoint: Path) -> None:
    """Refuses a checkpoint that lacks a parameter: lenient loading would leave it at its random start, unseen. Refuses
    one that is damaged, too.

    Args:
        sharded_state_dict: Megatron's sharded state dict of the model that was loaded.

    Raises:
        InputError: names the parameters that the checkpoint does not hold, or that are damaged.
    """
    saved = dist_checkpointing.load_tensors_metadata(str(ckpt_to_weights_subdir(checkpoint, is_saving=False)))
    wanted = {value.key for value in nested_values(sharded_state_dict) if isinstance(value, ShardedTensor)}
    # Projections of distillation's layer pairs start at random: no checkpoint of a model has them.
    optional = ("_extra_state", "_loss_modules")
    missing = sorted(key for key in wanted if key not in saved and not any(part in key for part in optional))
    if missing:
        raise InputError(f"{checkpoint} lacks {len(missing)} of the model's parameters, among them {missing[:3]}")
    check_bytes(checkpoint)


def check_bytes(checkpoint: Path) -> None:
    """Refuses a checkpoint whose bytes are not those that were written: torch writes CRCs and never checks them.

    Each rank checks its share of the saved objects; together they check all of them, once.

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
    """Puts a checkpoint's weights into a Megatron model that is in use, on all ranks, as upstream's `teacher_provider`
    does into a new one (nemo/collections/llm/modelopt/distill/utils.py:137).

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
    # Not strict for the sake of `_extra_state`; the parameters were checked above.
    model.load_state_dict(
        {name.removeprefix("module."): value for name, value in loaded["state_dict"].items()}, strict=False
    )


def core_model(model: Any) -> Any:
    """Megatron's own `GPTModel` inside NeMo's, ModelOpt's and the precision wrappers."""
    while hasattr(model, "module"):
        model = model.module
    return model


def count_parameters(core: Any) -> int:
    """Parameters of a Megatron model over all pipeline and tensor-parallel ranks: what they share counts once."""
    once = [p for p in core.parameters() if not getattr(p, "shared_embedding", False) or core.pre_process]
    if not torch.distributed.is_initialized():
        return sum(p.numel() for p in once)
    own = sum(p.numel() for p in once if param_is_not_tensor_parallel_duplicate(p))
    total = torch.tensor(own, device=backend.activate().device)
    torch.distributed.all_reduce(total)
    return int(total)


def number_layers(core: Any) -> None:
    """Marks each layer of a Megatron model with its number (from 1), which pruning carries along."""
    for layer in core.decoder.layers:
        layer.number_before_pruning = layer.layer_number


def kept_layers(core: Any) -> list[int]:
    """The numbers that the layers of a pruned model had before, over all ranks."""
    own = [layer.number_before_pruning for layer in core.decoder.layers]
    if not torch.distributed.is_initialized():
        return own
    everyones: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyones, own)
    return sorted({number for numbers in everyones for number in numbers})
