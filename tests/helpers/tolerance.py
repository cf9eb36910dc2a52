"""Tolerances of the arithmetic: fp32 on a CPU, TF32 matmuls (10 bits) in Transformer Engine on a GPU."""

from __future__ import annotations

from prune_distill.nemo import devices

GPU = devices.torch_device() == "cuda"
BACKEND = "gpu" if GPU else "cpu"
# Logits of equal models (about 5). CPU: sums in another order, a few 1e-6 measured; the project guarantees 1e-4.
LOGITS = 2e-2 if GPU else 1e-4
# Losses of the same run in another layout. CPU: 2e-8 measured; the project guarantees 1e-5.
LOSS = 1e-3 if GPU else 1e-5
# Gradients of the same run in another layout, of the largest one. CPU: sums in fp32 in another order, also in earlier
# steps of Adam; at most 1.3e-5 measured (AMD EPYC with AVX-512, upstream's loss), below 1e-5 on other processors.
GRADIENTS = 1e-3 if GPU else 2e-5
# Losses of the same run, killed and resumed: to the last digit on a CPU; a GPU's kernels may add in any order.
RESUMED = LOSS if GPU else 0.0
# Difference of Megatron's logits in bf16 from transformers' in fp32, as a multiple of that of transformers' in bf16.
# Both round to 8 bits, in other places: 0.9 measured with the stand-in on a CPU; not measured on a GPU.
BF16_LOGITS = 2.0
# Environment variables with which a GPU adds in a fixed order: attention kernels that Transformer Engine may choose
# (megatron/core/extensions/transformer_engine.py:940), and cuBLAS's workspace (torch.use_deterministic_algorithms).
DETERMINISTIC = {"NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
