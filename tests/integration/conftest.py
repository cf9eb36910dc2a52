"""What several integration tests start from."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from filelock import FileLock

from tests.helpers import tiny


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny run, depth-pruned, that came to its end. Tests read it, or copy it (`tiny.copy_run`).

    pytest-xdist's workers share one: the first to come makes it, the others wait.
    """
    base = tmp_path_factory.getbasetemp()
    run_dir = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "finished"
    with FileLock(f"{run_dir}.lock"):
        tiny.launch(run_dir, *tiny.DEPTH)
    return run_dir


SmallDisk = Callable[[str], Path]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[SmallDisk]:
    """Gives a file system of a size (`"256k"`), where this user may mount one; called again, it has the new size."""
    folder = tmp_path / "disk"

    def sized(size: str) -> Path:
        option = f"remount,size={size}" if folder.exists() else f"size={size}"
        folder.mkdir(exist_ok=True)
        if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", option, "tmpfs", folder]).returncode:
            pytest.skip("a full disk can be made by root only")
        return folder

    yield sized
    if folder.is_mount():
        subprocess.run(["umount", folder], check=True)
