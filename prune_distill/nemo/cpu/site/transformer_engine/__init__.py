"""A stand-in for NVIDIA Transformer Engine 1.9 in plain PyTorch, for machines without CUDA.

It implements what Megatron-Core, NeMo and Model Optimizer use of Transformer Engine to train, prune and export dense
GPT models, with the same signatures, parameter names, tensor layouts and parallelism. Unsupported features raise
`NotImplementedError`. Megatron imports it at megatron/core/extensions/transformer_engine.py:58.

The version is 1.9: below it Megatron replaces the QK norm
(megatron/core/extensions/transformer_engine_spec_provider.py:50), from 1.10 on it needs more modules and arguments
(megatron/core/extensions/transformer_engine.py:924, :957).

Raises:
    ImportError: on import, if CUDA is available or a real Transformer Engine is installed.
"""

from ._guard import check_machine

__version__ = "1.9.0+cpu.standin"

check_machine()

from . import common, pytorch  # noqa: E402  (the guard comes first)

__all__ = ["__version__", "common", "pytorch"]
