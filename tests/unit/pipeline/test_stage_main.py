"""The log of a stage's process."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from launch.environment import ROOT

PROGRAM = """
import logging, sys
from prune_distill.errors import InputError
from prune_distill.pipeline.stage_main import command_line
with command_line():
    uri = "http://alice:S3cretUriPw@mlflow.example:5000/?token=QuerySecret77"
    logging.getLogger("recipes.x").warning("first try: %s", uri)
    try:
        raise RuntimeError("cannot reach " + uri)
    except RuntimeError:
        logging.getLogger("some.library").exception("second try")
    raise {error}("cannot reach " + uri + " with correct-horse-battery")
"""


@pytest.mark.parametrize(("error", "status"), [("RuntimeError", 1), ("InputError", 2)])
def test_credentials_in_library_errors_are_not_logged(error: str, status: int) -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_PASSWORD": "correct-horse-battery"}
    command = [sys.executable, "-c", PROGRAM.format(error=error)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == status
    assert done.stderr.count("http://mlflow.example:5000/?token=[removed]") >= 3
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: cannot reach" if status == 2 else "RuntimeError: cannot reach")
    for secret in ("S3cretUriPw", "QuerySecret77", "correct-horse"):
        assert secret not in done.stdout + done.stderr
