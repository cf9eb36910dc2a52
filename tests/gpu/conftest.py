"""These tests need CUDA; without it they are skipped with a reason."""

from __future__ import annotations

import pytest

from tests.integration.conftest import finished, real_start  # noqa: F401


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    ranks = torch.cuda.device_count()
    for item in items:
        if "tests/gpu" not in item.path.as_posix():
            continue
        if not ranks:
            item.add_marker(pytest.mark.skip(reason="no CUDA device: run `make test-gpu` on a machine with one"))
        elif ranks < 2 and ("layout" in item.name or "killed_rank" in item.name or "pipeline_ranks" in item.name):
            item.add_marker(pytest.mark.skip(reason="needs two CUDA devices, there is one"))
