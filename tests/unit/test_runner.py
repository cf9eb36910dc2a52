"""`python -m recipes`: its command line, and how it imports a stage."""

from __future__ import annotations

import subprocess
import sys
from types import ModuleType

import pytest

import recipes
from launch.environment import ROOT
from prune_distill.pipeline.stages import STAGES, find
from recipes import __main__ as runner


def run(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", module, *arguments], cwd=ROOT, capture_output=True, text=True)


def test_help_lists_the_stages() -> None:
    done = run("recipes", "--help")
    assert done.returncode == 0
    listed = done.stdout.partition("stages:\n")[2].replace("\n", " ").replace(",", " ").split()
    assert listed == [stage.name for stage in STAGES]


def test_an_unknown_stage_is_one_line_with_the_known_ones() -> None:
    done = run("recipes", "distil", "--config", "resolved.yaml")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: there is no stage 'distil'; use one of demo_model, ")
    assert " distill.ce, " in line


def test_a_config_that_does_not_exist() -> None:
    done = run("recipes", "distill", "--config", "no/resolved.yaml")
    assert done.returncode == 2
    assert "--config=no/resolved.yaml: no such file" in done.stderr


@pytest.mark.parametrize("name", ["distill", "evaluate", "report", "benchmark", "prepare_data"])
def test_running_a_stage_module_prints_the_command(name: str) -> None:
    done = run(f"recipes.{name}", "--config", "resolved.yaml")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert f"use python -m recipes {name} --config " in line


@pytest.mark.parametrize("name", recipes.COMMANDS)
def test_commands_keep_their_own_command_line(name: str) -> None:
    done = run(f"recipes.{name}", "--help")
    assert done.returncode == 0
    assert f"recipes.{name}" in done.stdout


@pytest.mark.parametrize(("stage", "expected"), [("distill.ce", ["activate"]), ("evaluate", [])])
def test_the_backend_is_activated_before_a_module_that_needs_it_is_imported(
    stage: str, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    module = ModuleType("stage")
    monkeypatch.setitem(sys.modules, find(stage).module, module)
    monkeypatch.setattr(runner.backend, "activate", lambda: calls.append("activate"))
    monkeypatch.setattr(runner, "import_libraries", calls.append)
    assert runner.load_stage(find(stage)) is module
    assert calls == [*expected, find(stage).module]
