"""A tiny complete run, shared by the tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers import tiny
from tests.helpers.tolerance import DETERMINISTIC


@pytest.fixture(scope="session")
def deterministic() -> Iterator[None]:
    """Kernels that add in a fixed order, in the processes that tests start."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in DETERMINISTIC.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="session")
def finished(deterministic: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete tiny run with depth pruning, on the GPU."""
    run_dir = tmp_path_factory.getbasetemp() / "finished"
    tiny.launch(run_dir, *tiny.DEPTH)
    return run_dir
