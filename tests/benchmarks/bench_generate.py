"""python -m tests.benchmarks.bench_generate [--model FOLDER] [--sequences 16] [--new-tokens 64] [--rounds 5]

Tokens per second of sampled completions: vLLM compared with `generate` of transformers, both as an on-policy round runs
them, with the same student, prompts and number of concurrent sequences, in interleaved rounds in one run. Without
`--model`, the student has the shape of Qwen3-0.6B and random weights in bf16.

Two workloads: one batch of completions of equal length; and four times as many completions as run at the same time,
which end at any token with the same probability, so that their lengths differ as those of real completions do.

Writes runs/bench/generate.json.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from prune_distill.benchmarking.vllm_engine import SECONDS_TO_REST
from prune_distill.config.values import SERVE_PYTHON
from prune_distill.generation.engines import Engine, Request, TransformersEngine, VllmEngine
from prune_distill.model import hf_config
from prune_distill.pipeline.artifact import write_json
from prune_distill.schema import OnPolicy

ROOT = Path(__file__).parents[2]
# Whether completions end by themselves.
WORKLOADS = {"of equal length": False, "of different lengths": True}
QWEN3_0_6B = {
    "vocab_size": 151936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": True,
    "max_position_embeddings": 2048,
    "rope_theta": 1e6,
    "eos_token_id": 0,
    "bos_token_id": 1,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a Hugging Face folder")
    parser.add_argument("--sequences", type=int, default=16, help="generated at the same time")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=QWEN3_0_6B["num_hidden_layers"], help="of the random student")
    args = parser.parse_args()
    folder = args.model or write_random(ROOT / "runs/bench/generate", args.layers)
    sizes = args.sequences, args.prompt_tokens, args.new_tokens, args.rounds
    results = {name: measure(folder, *sizes, ends=ends) for name, ends in WORKLOADS.items()}
    print(table(results))
    names = ("sequences", "prompt_tokens", "new_tokens", "rounds")
    write_json(ROOT / "runs/bench/generate.json", {**dict(zip(names, sizes, strict=True)), "workloads": results})


def write_random(folder: Path, layers: int) -> Path:
    """Write a student with random weights."""
    config = AutoConfig.for_model("qwen3", **{**QWEN3_0_6B, "num_hidden_layers": layers}, torch_dtype=torch.bfloat16)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, torch_dtype=torch.bfloat16).save_pretrained(folder)
    return folder


def measure(
    folder: Path, sequences: int, prompt_tokens: int, new_tokens: int, rounds: int, *, ends: bool
) -> dict[str, Any]:
    """Time both engines in interleaved rounds, after one that does not count.

    Args:
        ends: whether every token ends its completion with probability 2 / `new_tokens`.
    """
    count = 4 * sequences if ends else sequences
    on_policy = OnPolicy(steps=1, lr=1.0, prompts_per_round=count, batch_size=sequences, max_new_tokens=new_tokens)
    vocabulary = hf_config.read_config(folder / "config.json")["vocab_size"]
    # With random weights, all tokens are about equally probable.
    stop_ids = list(range(0, vocabulary, new_tokens // 2)) if ends else [vocabulary - 1]
    speeds: dict[str, list[float]] = {"vllm": [], "transformers": []}
    with ExitStack() as stack:
        length = prompt_tokens + new_tokens
        engines: dict[str, Engine] = {
            "vllm": stack.enter_context(closing(VllmEngine(folder, on_policy, length, stop_ids, SERVE_PYTHON))),
            "transformers": stack.enter_context(closing(TransformersEngine(folder, on_policy, stop_ids))),
        }
        for number in range(rounds + 1):
            ids = torch.randint(3, vocabulary - 1, (count, prompt_tokens), generator=torch.Generator().manual_seed(1))
            requests = [Request(prompt, count * number + n) for n, prompt in enumerate(ids.tolist())]
            for name, engine in engines.items():
                time.sleep(SECONDS_TO_REST)
                speeds[name].append(tokens_per_second(engine, requests))
    counted = {name: values[1:] for name, values in speeds.items()}
    ratios = [mine / other for mine, other in zip(counted["vllm"], counted["transformers"], strict=True)]
    return {"tokens_per_second": counted, "ratios": ratios, "ratio": median(ratios)}


def tokens_per_second(engine: Engine, requests: Sequence[Request]) -> float:
    started = time.perf_counter()
    completions = engine.complete(requests)
    return sum(len(completion.ids) for completion in completions) / (time.perf_counter() - started)


def table(results: dict[str, dict[str, Any]]) -> str:
    lines = ["| completions | vLLM, tokens/s | transformers, tokens/s | vLLM is faster by |", "|---|---|---|---|"]
    for name, result in results.items():
        speeds = result["tokens_per_second"]
        cells = [_spread(speeds["vllm"], ".1f"), _spread(speeds["transformers"], ".1f")]
        lines.append(f"| {name} | {' | '.join(cells)} | {_spread(result['ratios'], '.2f')}x |")
    return "\n".join(lines)


def _spread(values: Sequence[float], form: str) -> str:
    return f"{median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


if __name__ == "__main__":
    main()
