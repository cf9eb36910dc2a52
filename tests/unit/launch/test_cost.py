"""Inspecting a run, and starting a complete one again, is cheap: no torch, no NeMo."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.local import ROOT
from prune_distill.pipeline.artifact import locate, write_manifest
from prune_distill.schema import RunConfig

HEAVY = {"torch", "nemo", "megatron", "modelopt", "transformers", "datasets", "numpy"}
CODE = "import sys, {0}; code = {0}.main(sys.argv[1:]); print('MODULES', *sys.modules); sys.exit(code)"
# 1.2 s on two quiet cores; the rest is for busy ones.
SECONDS = 10.0


def cheaply(*arguments: str, module: str = "launch.run") -> str:
    """Return the output of a command, after checking that it is cheap."""
    started = time.monotonic()
    command = [sys.executable, "-c", CODE.format(module), "experiment=demo", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert time.monotonic() - started < SECONDS
    printed, _, names = done.stdout.partition("MODULES ")
    modules = {name.partition(".")[0] for name in names.split()}
    assert "launch" in modules
    assert not modules & HEAVY
    return printed


@pytest.mark.parametrize("argument", ["--list", "--cfg=job", "dry_run=true"])
def test_inspection_is_cheap_and_writes_nothing(tmp_path: Path, argument: str) -> None:
    assert "prune" in cheaply(argument, f"run_dir={tmp_path}")
    assert list(tmp_path.iterdir()) == []


def test_a_plan_is_cheap_and_writes_nothing(tmp_path: Path) -> None:
    assert "GiB a rank" in cheaply(f"run_dir={tmp_path}", module="launch.plan")
    assert list(tmp_path.iterdir()) == []


def test_a_slurm_dry_run_is_cheap(tmp_path: Path) -> None:
    site = [f"cluster.slurm.{key}=null" for key in ("partition", "account", "container_image")]
    shared = ("cluster=slurm", "cluster.devices_per_node=1", "cluster.run_dir_is_shared=true", "dry_run=true")
    assert cheaply(*shared, *site, f"run_dir={tmp_path}").count("#!/bin/bash -l") == 17
    assert list(tmp_path.iterdir()) == []


def test_a_finished_run_ends_at_once(demo: Callable[..., RunConfig]) -> None:
    cfg = demo()
    stages = locate(cfg)
    for stage in stages.values():
        stage.folder.mkdir(parents=True)
        write_manifest(stage, 0.0, 1.0, {})
    assert cheaply(f"run_dir={cfg.run_dir}", "quantize.formats=[]").count("complete, skipped") == len(stages)
