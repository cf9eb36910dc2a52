"""`launch.run --help-config`."""

from __future__ import annotations

import subprocess
import sys

import pytest

from launch.help_config import WIDTH, to_markdown, to_text
from launch.local import ROOT
from launch.run import main
from prune_distill.config.reference import list_settings
from prune_distill.errors import ConfigError

KEYS = [setting.key for setting in list_settings()]


def list_keys(text: str) -> list[str]:
    return [line for line in text.splitlines() if line and not line.startswith(" ")]


def test_all_keys_are_printed_and_wrapped() -> None:
    text = to_text()
    assert list_keys(text) == KEYS
    assert max(map(len, text.splitlines())) <= WIDTH


@pytest.mark.parametrize(
    "group", ["distill", "distill.kd", "prune.budget", "distill.teacher_correction", "cluster.slurm."]
)
def test_a_group(group: str) -> None:
    group = group.rstrip(".")
    assert list_keys(to_text(group)) == [key for key in KEYS if key == group or key.startswith((f"{group}.",))]


def test_an_item_of_a_list() -> None:
    assert list_keys(to_text("distill.phases[0].lr")) == ["distill.phases[N].lr"]
    assert "distill.phases[N].lr" in list_keys(to_text("distill.phases"))


def test_an_entry() -> None:
    assert to_text("distill.kd.chunk_tokens") == (
        "distill.kd.chunk_tokens\n"
        "    integer, above 0; default auto (distill=minitron)\n"
        "    Tokens whose logits are in memory at the same time, unless implementation=upstream. `auto`: the\n"
        "    fewest with which the loss is nearly as fast as it gets, as far as the GPU's memory goes.\n"
    )


def test_an_unknown_group() -> None:
    with pytest.raises(ConfigError, match=r"did you mean distill\?.*groups: model, teacher, data, prune"):
        to_text("distil")


def test_markdown_has_each_key_once_except_for_other_trainings() -> None:
    page = to_markdown()
    others = ("distill.teacher_correction.", "model.demo.training.")
    listed = [key for key in KEYS if not key.startswith(others)]
    tops = [
        key
        for key in listed
        if key in {"model", "teacher", "data", "prune", "distill", "convert", "evaluate", "benchmark", "quantize"}
    ]
    rows = [line.split("`")[1] for line in page.splitlines() if line.startswith("| `")]
    assert sorted(rows) == sorted(set(listed) - {*tops, "cluster"})
    assert len(rows) == len(set(rows))


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--help-config", "distill", "experiment=demo"], "remove experiment=demo"),
        (["--markdown"], "add --help-config"),
        (["--help-config", "distill", "--markdown"], "remove distill"),
    ],
)
def test_options_that_do_not_go_together(arguments: list[str], part: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert part in capsys.readouterr().err


def test_no_experiment_and_no_torch_are_needed() -> None:
    code = "import sys, launch.run; launch.run.main(['--help-config', 'distill.kd']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert list_keys(done.stdout)[-2:] == ["distill.kd.chunk_tokens", "False"]


def test_the_help_mentions_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "--help-config [GROUP]" in capsys.readouterr().out
