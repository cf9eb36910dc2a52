"""The precision of models: NeMo's precision plugin, and FP8.

Import this module after `backend.activate()`; the runner calls that before it imports a stage.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from nemo import lightning as nl
from transformer_engine.pytorch.fp8 import FP8GlobalStateManager

from prune_distill.errors import ConfigError
from prune_distill.nemo.devices import device_name
from prune_distill.schema import Fp8, Precision

# Arguments of NeMo's precision plugin (nemo/lightning/pytorch/plugins/mixed_precision.py). With block scales e4m3 is
# Transformer Engine's default for gradients too (transformer_engine/common/recipe/__init__.py:Float8BlockScaling).
FP8_SETTINGS = {
    Fp8.hybrid: {"fp8": "hybrid", "fp8_recipe": "tensorwise"},
    Fp8.blockwise: {"fp8": "e4m3", "fp8_recipe": "blockwise"},
}


def precision_plugin(precision: Precision, fp8: Fp8 | None = None) -> nl.MegatronMixedPrecision:
    """Make NeMo's precision plugin. In bf16 the gradients are reduced in fp32, as in NeMo's recipes.

    FP8 scales follow from the tensors themselves (`tensorwise`, `blockwise`). NeMo's default, `delayed`, takes them
    from a history of maxima, which resumes exactly only where every module's `_extra_state` is stored and loaded
    (transformer_engine/pytorch/module/base.py:get_extra_state). Weights stay in bf16 (`fp8_param_gather` is off).
    """
    dtype = torch.bfloat16 if precision is Precision.bf16 else torch.float32
    return nl.MegatronMixedPrecision(
        precision="bf16-mixed" if precision is Precision.bf16 else "32",
        params_dtype=dtype,
        pipeline_dtype=dtype,
        autocast_enabled=False,
        grad_reduce_in_fp32=True,
        **(FP8_SETTINGS[fp8] if fp8 else {}),
    )


def model_precision(config: Any) -> Precision:
    """Return the precision of a checkpoint's weights."""
    return Precision.bf16 if config.params_dtype is torch.bfloat16 else Precision.fp32


def match_precision(teacher: Any, precision: Precision, fp8: Fp8 | None) -> None:
    """Set the data types of the teacher's config, because the precision plugin only sets the student's."""
    for name, value in vars(precision_plugin(precision, fp8).dtype_config).items():
        if hasattr(teacher, name):
            setattr(teacher, name, value)


def require_fp8(settings: Mapping[str, Fp8 | None]) -> None:
    """Reject FP8 that this machine cannot compute.

    Args:
        settings: FP8 scales by the config key that asks for them.

    Raises:
        ConfigError: states what Transformer Engine needs.
    """
    checks = {
        Fp8.hybrid: FP8GlobalStateManager.is_fp8_available,
        Fp8.blockwise: FP8GlobalStateManager.is_fp8_block_scaling_available,
    }
    for key, fp8 in settings.items():
        if fp8 is None:
            continue
        available, reason = checks[fp8]()
        if not available:
            value, off = ("true", "false") if key.endswith("teacher_fp8") else (fp8.value, "null")
            raise ConfigError(
                f"{key}={value}: {device_name()} does not compute {fp8.value} FP8 ({reason.rstrip('.')}); set "
                f"{key}={off}, or use other GPUs"
            )
