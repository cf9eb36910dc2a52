"""Triton's kernels on a CPU: by its interpreter, and compiled without being run.

Triton is installed in a folder of its own beside the environment's packages (see the Makefile), so that no library
finds it that would take it for a GPU. Call these functions in processes of their own (`run_ranks`): Triton decides when
it is imported whether it interprets.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import sys
from pathlib import Path

from torch import Tensor

from prune_distill.schema import KdConfig, LossImplementation

FOLDER = Path(sys.prefix) / "test-only"
# Several of them make up a row of the tests, and the last one is not full.
BLOCK = 16


def losses(specs: list[KdConfig], teacher_vocabulary: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """`sliced` of test_kd_loss by the kernels."""
    sys.path.append(str(FOLDER))
    os.environ["TRITON_INTERPRET"] = "1"
    from prune_distill.distillation import triton_chunk
    from tests.unit.distillation.test_kd_loss import sliced

    triton_chunk.BLOCK = BLOCK
    specs = [dataclasses.replace(spec, implementation=LossImplementation.triton) for spec in specs]
    return sliced(specs, teacher_vocabulary)


def token_losses(spec: KdConfig) -> tuple[Tensor, Tensor]:
    """The losses of each token, computed without gradients by the kernels."""
    sys.path.append(str(FOLDER))
    os.environ["TRITON_INTERPRET"] = "1"
    import torch

    from prune_distill.distillation import triton_chunk
    from prune_distill.distillation.kd_loss import distillation_loss
    from prune_distill.distillation.loss_chunk import Head
    from tests.unit.distillation.test_kd_loss import tensors

    triton_chunk.BLOCK = BLOCK
    given, spec = tensors(), dataclasses.replace(spec, implementation=LossImplementation.triton)
    heads = Head(given["hidden"], given["weight"]), Head(given["teacher_hidden"], given["teacher_weight"])
    with torch.no_grad():
        _, tokens = distillation_loss(*heads, given["labels"], given["mask"], spec)
    return tokens.kd, tokens.lm


def compiled_sizes(capability: int) -> dict[str, int]:
    """Bytes of the machine code of each kernel and variant for GPUs of a compute capability (90: 9.0)."""
    sys.path.append(str(FOLDER))
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from prune_distill.distillation import triton_chunk

    types = {
        "rows": "i32",
        "columns": "i32",
        "inverse_temperature": "fp32",
        "gradient_ptr": "*bf16",
        "label_ptr": "*i64",
    }
    kernels = [triton_chunk._row_sums, triton_chunk._jensen_shannon_sums, triton_chunk._gradients]
    sizes = {}
    for kernel, code, with_lm in itertools.product(kernels, triton_chunk.CODES.values(), (False, True)):
        constants = {"DIVERGENCE": code, "WITH_LM": with_lm, "BLOCK": triton_chunk.BLOCK}
        constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
        signature = {name: "constexpr" if name in constants else types.get(name, "*fp32") for name in kernel.arg_names}
        name = "-".join(map(str, (kernel.__name__, *constants.values())))
        if name not in sizes:
            source = ASTSource(kernel, signature, constants)
            target, options = GPUTarget("cuda", capability, 32), {"num_warps": triton_chunk.WARPS}
            sizes[name] = len(triton.compile(source, target=target, options=options).asm["cubin"])
    return sizes
