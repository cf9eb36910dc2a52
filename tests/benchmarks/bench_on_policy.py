"""python -m tests.benchmarks.bench_on_policy FOLDER [--rounds 2] [--steps 80] [--engine transformers]

On-policy rounds compared with as many further steps of distillation on the same number of sequences of the data alone,
at the demo's size, for three seeds. All arms of a seed continue the same distilled student, through the command line.

Measured: the held-out loss of the last student, on the whole validation set; of completions that it samples after the
beginnings of held-out documents, the loss under the teacher and the KL divergence from it (the mean of the student's
log-probability minus the teacher's), all in nats per token.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from launch.planning.automatic import compose
from prune_distill.data.folder import DataFolder
from prune_distill.generation.engines import Completion, Request, TransformersEngine
from prune_distill.nemo import hf_models
from prune_distill.pipeline.artifact import Located, locate, read_manifest
from prune_distill.schema import OnPolicy
from tests.benchmarks.quality import ROOT, teacher_of_the_demo

# The share of completions; next to nothing means none of a round's sequences.
ARMS = {"off-policy": 1e-9, "half on-policy": 0.5, "on-policy": 1.0}
PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 256, 32, 96
MEASURES = ("val_loss", "teacher_loss", "kl")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=80, help="of each round")
    parser.add_argument("--engine", default="transformers", help="vllm, transformers")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of all arms")
    args = parser.parse_intermixed_args()
    folder = args.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    teacher = teacher_of_the_demo(folder / "teacher")
    results = []
    for seed in range(1, args.seeds + 1):
        for arm, mix in ARMS.items():
            words = overrides(teacher, folder / f"seed{seed}", seed)
            words.append(rounds(args.rounds, args.steps, mix, args.engine))
            found = measure([*words, *args.overrides], args.rounds, teacher, seed)
            print(f"seed {seed}, {arm}: {found}", flush=True)
            results.append({"arm": arm, "seed": seed, **found})
            (folder / "on_policy.json").write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))


def overrides(teacher: Path, run_dir: Path, seed: int) -> list[str]:
    corpus = teacher.parent / "corpus"
    return [
        *("experiment=demo", "model=local", "model.family=qwen3", f"model.hf_path={teacher}"),
        *(f"data.train=[{corpus / 'train.jsonl'}]", f"data.validation=[{corpus / 'validation.jsonl'}]"),
        *(f"run_dir={run_dir}", f"seed={seed}", "distill.controls=[]", "evaluate.verify_tokens=0"),
        # From the teacher alone, so that the data's own tokens decide in no arm.
        *("distill.kd.kd_weight=1", "distill.kd.lm_weight=0"),
    ]


def rounds(count: int, steps: int, mix: float, engine: str) -> str:
    # As many completions as the steps read, at about two to a sequence of 256 tokens.
    prompts = max(8, round(2 * steps * 4 * mix))
    sizes = f"prompts_per_round: {prompts}, prompt_tokens: {PROMPT_TOKENS}, max_new_tokens: {NEW_TOKENS}"
    training = f"rounds: {count}, steps: {steps}, lr: 3e-4, min_lr: 3e-5, warmup_steps: 5, mix: {mix}"
    return f"distill.on_policy={{{training}, {sizes}, engine: {engine}}}"


def measure(words: Sequence[str], count: int, teacher: Path, seed: int) -> dict[str, float]:
    """Run an arm up to its last student, and measure that."""
    command = [sys.executable, "-m", "launch.run", *words, "--until", "nemo_to_hf"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr[-3000:]}")
    located = locate(compose(list(words)))
    manifest = read_manifest(located[f"distill.on_policy{count}"].folder)
    assert manifest is not None
    val_loss = float(manifest["metrics"]["val_loss"])
    return {"val_loss": val_loss, **score(located, located["nemo_to_hf"].folder / "student", teacher, seed)}


def score(located: dict[str, Located], student: Path, teacher: Path, seed: int) -> dict[str, float]:
    """Sample completions after held-out documents' beginnings, and score them."""
    data = DataFolder.read(located["prepare_data"].folder)
    documents = [ids for ids in data.validation_documents_ids() if len(ids) > PROMPT_TOKENS]
    prompts = [document[:PROMPT_TOKENS].tolist() for document in documents[:PROMPTS]]
    settings = OnPolicy(steps=1, lr=1.0, prompts_per_round=len(prompts), max_new_tokens=NEW_TOKENS)
    requests = [Request(prompt, seed * PROMPTS + number) for number, prompt in enumerate(prompts)]
    completions = TransformersEngine(student, settings, [data.eod_token]).complete(requests)
    own, teachers = (log_probs(hf_models.load(folder), requests, completions) for folder in (student, teacher))
    return {"teacher_loss": -teachers.mean().item(), "kl": (own - teachers).mean().item()}


def log_probs(model: Any, requests: Sequence[Request], completions: Sequence[Completion]) -> torch.Tensor:
    """Return the log-probability of each new token, `[tokens]`."""
    found = []
    for request, completion in zip(requests, completions, strict=True):
        ids = torch.tensor([request.prompt + completion.ids])
        with torch.inference_mode():
            logits = model(ids).logits[0, len(request.prompt) - 1 : -1].double()
        found.append(torch.log_softmax(logits, -1).gather(-1, torch.tensor(completion.ids)[:, None])[:, 0])
    return torch.cat(found)


def table(results: list[dict[str, Any]]) -> str:
    lines = ["| arm | held-out loss | completions: loss under the teacher | KL from the teacher |", "|---|---|---|---|"]
    for arm in dict.fromkeys(result["arm"] for result in results):
        own = [result for result in results if result["arm"] == arm]
        cells = []
        for name in MEASURES:
            values = [result[name] for result in own]
            cells.append(f"{mean(values):.4f} ({', '.join(f'{value:.4f}' for value in values)})")
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
