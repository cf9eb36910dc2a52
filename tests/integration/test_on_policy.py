"""On-policy rounds through the real command line: they are killed at every stage, and resume to the same result."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from prune_distill.data.folder import DataFolder
from prune_distill.data.shards import read_documents
from prune_distill.pipeline.artifact import Located, read_manifest, read_state
from tests.helpers import corruption, tiny
from tests.helpers.killed_run import find_stage_processes

PROMPTS, SAMPLES, PROMPT_TOKENS, NEW_TOKENS, STEPS = 10, 2, 16, 24, 4
ROUNDS = (
    "distill.on_policy={steps: 4, lr: 1e-3, prompts_per_round: 10, prompt_tokens: 16, max_new_tokens: 24, "
    "samples_per_prompt: 2, shard_prompts: 2, engine: transformers}",
    *("distill.controls=[]", "evaluate.recovery=true", "distill.save_every_n_steps=1"),
)
CACHED = (
    *(*tiny.DEPTH, *ROUNDS, "distill.on_policy.rounds=2", "distill.teacher_logits=cached"),
    *("distill.cached_logits_top_k=16", "distill.cached_logits_shard_sequences=5"),
)
LIVE = (*tiny.DEPTH, *ROUNDS, "distill.kd.divergence=reverse_kl", "distill.on_policy.mix=1")


@pytest.fixture(scope="module")
def whole(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny run with two rounds and cached logits."""
    run_dir = tiny.copy_run(finished, tmp_path_factory.mktemp("on_policy") / "run")
    tiny.launch(run_dir, *CACHED)
    return run_dir


@pytest.fixture(scope="module")
def located(whole: Path) -> dict[str, Located]:
    return tiny.stages(whole, *CACHED)


def metrics(located: dict[str, Located], stage: str) -> dict[str, Any]:
    manifest = read_manifest(located[stage].folder)
    assert manifest is not None, stage
    found: dict[str, Any] = manifest["metrics"]
    return found


def completions(folder: Path) -> list[dict[str, Any]]:
    shards = sorted(folder.glob("shards/*.jsonl"))
    return [json.loads(line) for shard in shards for line in shard.read_text().splitlines()]


def test_the_completions_are_the_students_own(located: dict[str, Located]) -> None:
    """The prompts begin training documents, and the student finds what it wrote as probable as it is on average."""
    from transformers import AutoModelForCausalLM

    lines = completions(located["generate.on_policy1"].folder)
    assert len(lines) == PROMPTS * SAMPLES
    data = DataFolder.read(located["prepare_data"].folder)
    prefixes = [data.folder / part["prefix"] for part in data.train]
    beginnings = {tuple(ids[:PROMPT_TOKENS].tolist()) for prefix in prefixes for ids in read_documents(prefix)}
    assert {tuple(line["prompt"]) for line in lines} <= beginnings
    assert len({tuple(line["prompt"]) for line in lines}) == PROMPTS
    assert len({tuple(line["completion"]) for line in lines}) == PROMPTS * SAMPLES
    model = AutoModelForCausalLM.from_pretrained(located["nemo_to_hf.on_policy1"].folder / "student")
    surprise, entropy = 0.0, 0.0
    for line in lines:
        ids = torch.tensor([line["prompt"] + line["completion"]])
        with torch.no_grad():
            logprobs = torch.log_softmax(model(ids).logits.double(), -1)[0, PROMPT_TOKENS - 1 : -1]
        surprise -= logprobs.gather(-1, ids[0, PROMPT_TOKENS:, None]).sum().item()
        entropy -= (logprobs.exp() * logprobs).sum().item()
    count = sum(len(line["completion"]) for line in lines)
    # For samples of the model itself the two are equal on average. The surprise of a token has a standard deviation of
    # less than 2 nats here, so this is 4 standard errors.
    assert abs(surprise - entropy) / count < 8 / count**0.5


def test_what_a_round_counts_and_trains(located: dict[str, Located]) -> None:
    lines, found = completions(located["generate.on_policy1"].folder), metrics(located, "generate.on_policy1")
    assert (found["prompts"], found["completions"]) == (PROMPTS, PROMPTS * SAMPLES)
    assert found["truncated"] == sum(len(line["completion"]) == NEW_TOKENS and not line["ended"] for line in lines)
    assert found["completion_tokens"] == sum(len(line["completion"]) for line in lines)
    data = DataFolder.read(located["generate.on_policy1"].folder)
    masks = np.concatenate(list(read_documents(data.folder / "train_mask")))
    assert int(masks.sum()) == found["completion_tokens"]
    assert metrics(located, "distill.on_policy1")["steps"] == STEPS
    inputs = json.loads((located["distill.on_policy2"].folder / "manifest.json").read_text())["inputs"]
    assert inputs["student"]["path"].startswith("distill.on_policy1-")
    assert inputs["cached_logits"]["path"].startswith("cache_logits.on_policy2-")


def test_the_last_student_is_evaluated_and_reported(whole: Path, located: dict[str, Located]) -> None:
    report = tiny.report(whole)
    models = report["models"]
    assert list(models) == ["teacher", "pruned", "distilled", "student"]
    assert models["student"]["hf_path"].startswith("nemo_to_hf-")
    assert models["distilled"]["hf_path"].startswith("nemo_to_hf.on_policy1-")
    student = json.loads((located["nemo_to_hf"].folder / "manifest.json").read_text())["inputs"]["student"]
    assert student["path"].startswith("distill.on_policy2-")
    assert metrics(located, "verify")["export_max_abs_logit_diff"] < 1e-4
    # The curve is that of the distillation before the rounds.
    last = report["recovery"][-1]
    assert (last["step"], last["val_loss"]) == (tiny.DISTILL["max_steps"], models["distilled"]["val_loss"])
    page = (whole / "report/index.html").read_text()
    assert "On-policy rounds" in page
    assert "Student before on-policy rounds" in page


@pytest.mark.parametrize(
    ("stage", "progress"),
    [
        ("generate.on_policy2", "shards/*.jsonl"),
        ("cache_logits.on_policy2", "shard-*.bin"),
        ("distill.on_policy2", "checkpoints/step=*"),
    ],
)
@pytest.mark.usefixtures("real_start")
def test_a_killed_round_resumes_to_the_same_result(
    whole: Path, located: dict[str, Located], tmp_path: Path, stage: str, progress: str
) -> None:
    run_dir = tmp_path / "run"
    subprocess.run(["cp", "-a", whole, run_dir], check=True)
    folder = tiny.stages(run_dir, *CACHED)[stage].folder
    redone = ("generate.on_policy2", "cache_logits.on_policy2", "distill.on_policy2")
    for later in redone[redone.index(stage) :]:
        shutil.rmtree(tiny.stages(run_dir, *CACHED)[later].folder)
    words = (*CACHED, "--until", "distill.on_policy2")
    launcher = subprocess.Popen(
        tiny.command(run_dir, *words), env=tiny.environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        tiny.wait_for(progress, folder, launcher)
    finally:
        # The stage first: it ends with its launcher, but by SIGTERM.
        for pid in [*find_stage_processes(run_dir), launcher.pid]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        launcher.wait()
    assert not (folder / "manifest.json").exists(), "the stage had ended before it was killed"
    kept = {path: path.stat().st_mtime_ns for path in folder.glob(progress)}
    tiny.launch(run_dir, *words)
    if not stage.startswith("distill"):
        assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert completions(tiny.stages(run_dir, *CACHED)["generate.on_policy2"].folder) == completions(
        located["generate.on_policy2"].folder
    )
    last = tiny.stages(run_dir, *CACHED)["distill.on_policy2"].folder
    assert tiny.losses(last, STEPS) == tiny.losses(located["distill.on_policy2"].folder, STEPS)
    assert tiny.validations(last) == tiny.validations(located["distill.on_policy2"].folder)


def test_a_paused_generation_resumes(whole: Path, located: dict[str, Located], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    subprocess.run(["cp", "-a", whole, run_dir], check=True)
    folder = tiny.stages(run_dir, *CACHED)["generate.on_policy2"].folder
    shutil.rmtree(folder)
    words = (*CACHED, "--until", "generate.on_policy2")
    command, pipe = tiny.command(run_dir, *words), subprocess.PIPE
    launcher = subprocess.Popen(command, env=tiny.environment(), stdout=pipe, stderr=pipe, text=True)
    tiny.wait_for("shards/*.jsonl", folder, launcher)
    (folder / "stop").touch()
    _, message = launcher.communicate(timeout=600)
    done = len(list(folder.glob("shards/*.jsonl")))
    assert 0 < done < PROMPTS // 2
    assert f"stage generate.on_policy2 is paused at step {done}; run the same command to resume it" in message
    assert read_state(folder) == {"state": "paused", "step": done}
    tiny.launch(run_dir, *words)
    assert completions(folder) == completions(located["generate.on_policy2"].folder)


def test_ranks_share_the_prompts(whole: Path, located: dict[str, Located], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    subprocess.run(["cp", "-a", whole, run_dir], check=True)
    folder = tiny.stages(run_dir, *CACHED)["generate.on_policy1"].folder
    shutil.rmtree(folder)
    tiny.launch(run_dir, *CACHED, "cluster.devices_per_node=2", "--until", "generate.on_policy1")
    assert completions(folder) == completions(located["generate.on_policy1"].folder)
    assert metrics(tiny.stages(run_dir, *CACHED), "generate.on_policy1") == metrics(located, "generate.on_policy1")


@pytest.mark.usefixtures("real_start")
def test_tasks_of_an_array_share_the_prompts_and_take_over_those_of_a_killed_one(
    whole: Path, located: dict[str, Located], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    subprocess.run(["cp", "-a", whole, run_dir], check=True)
    config = run_dir / "resolved.yaml"
    config.write_text(config.read_text().replace(str(whole), str(run_dir)))
    folder = tiny.stages(run_dir, *CACHED)["generate.on_policy1"].folder
    shutil.rmtree(folder)
    command = [sys.executable, "-m", "recipes", "generate.on_policy1", "--config", str(config)]
    tasks = [
        subprocess.Popen(command, env={**tiny.environment(), "SLURM_ARRAY_TASK_ID": str(number)}) for number in (0, 1)
    ]
    try:
        tiny.wait_for("shards/*.jsonl", folder, tasks[0])
        tasks[1].kill()
        assert tasks[0].wait(300) == 0
    finally:
        for task in tasks:
            task.kill()
            task.wait()
    assert completions(folder) == completions(located["generate.on_policy1"].folder)
    assert metrics(tiny.stages(run_dir, *CACHED), "generate.on_policy1") == metrics(located, "generate.on_policy1")


def test_damaged_completions_are_rejected(located: dict[str, Located], tmp_path: Path) -> None:
    tried, silent = corruption.find_silent_uses(located, tmp_path / "aside", ["generate.on_policy1"])
    assert silent == []
    assert tried >= 20


def test_a_live_teacher_scores_completions_of_prompts_from_a_file(finished: Path, tmp_path: Path) -> None:
    """Reverse KL on completions alone."""
    run_dir = tiny.copy_run(finished, tmp_path / "run")
    prompts = tmp_path / "prompts.jsonl"
    long = "many words " * 200
    records = [{"prompt": f"Number {number} is"} for number in range(8)] + [{"prompt": long}, {"text": long}]
    prompts.write_text("".join(json.dumps(record) + "\n" for record in records))
    words = (*LIVE, f"distill.on_policy.prompts=[{prompts}]")
    tiny.launch(run_dir, *words, "--until", "distill.on_policy1")
    located = tiny.stages(run_dir, *words)
    found = metrics(located, "generate.on_policy1")
    # The long prompt does not fit; of the long text the first tokens are the prompt.
    assert (found["prompts"], found["prompts_too_long"]) == (9, 1)
    assert (
        "1 prompts have more than 103 tokens and are left out"
        in (located["generate.on_policy1"].folder / "log.txt").read_text()
    )
    assert len(tiny.losses(located["distill.on_policy1"].folder, STEPS)) == STEPS
    # Longer prompts leave none.
    short = prompts.with_name("short.jsonl")
    short.write_text(json.dumps({"prompt": long}) + "\n")
    done = tiny.launch(
        run_dir, *LIVE, f"distill.on_policy.prompts=[{short}]", "--until", "distill.on_policy1", check=False
    )
    assert done.returncode == 2
    assert "no prompt is left of 1 records (0 empty, 0 broken, 1 with more than 103 tokens)" in done.stderr
