"""What several integration tests start from."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers import tiny


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny run, depth-pruned, that came to its end. Tests read it, or copy it (`tiny.copy_run`)."""
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    tiny.launch(run_dir, *tiny.DEPTH)
    return run_dir
