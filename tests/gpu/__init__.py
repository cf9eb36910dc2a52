"""Tests of what only a GPU can show (`make test-gpu`): real kernels of CUDA and Transformer Engine.

Their helpers run on a CPU too, in the tests of `tests/unit` and `tests/integration` that import them.
"""
