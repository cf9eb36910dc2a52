"""PYTHON -P child.py PID load_worker.py

Send requests to vLLM servers as `vllm bench serve` does, with vLLM's benchmark library. Each line of the standard
input requests a measurement as JSON, and gets one line of JSON as its answer. The process ends with its input.

It runs in the serving environment, which has none of this repository's libraries, so it only imports vLLM.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import sys
from typing import Any

import numpy as np
from vllm.benchmarks import serve
from vllm.benchmarks.datasets import SampleRequest


def main() -> None:
    answers = os.fdopen(int(sys.argv[1]), "w")
    os.environ["no_proxy"] = "*"  # the servers are on this machine
    for line in sys.stdin:
        answers.write(json.dumps(_measure(**json.loads(line))) + "\n")
        answers.flush()


def _measure(
    url: str, model: str, prompts: list[list[int]], new_tokens: int, request_rate: float | None, seed: int
) -> dict[str, Any]:
    """Send a request per prompt, at random times (a Poisson process).

    Args:
        request_rate: requests per second; None sends all of them at once.

    Returns:
        `duration` in seconds; `output_tokens`; for each request that succeeded, the seconds to its first token
        (`first_token`) and from there to its end per token (`per_token`); the messages of those that failed (`errors`).
    """
    np.random.seed(seed)  # the times of requests
    found = asyncio.run(
        serve.benchmark(
            task_type=serve.TaskType.GENERATION,
            endpoint_type="openai",
            api_url=f"{url}/v1/completions",
            base_url=url,
            model_id=model,
            model_name=model,
            tokenizer=None,
            input_requests=[SampleRequest(ids, len(ids), new_tokens) for ids in prompts],
            logprobs=None,
            request_rate=math.inf if request_rate is None else request_rate,
            burstiness=1.0,
            disable_tqdm=True,
            num_warmups=0,
            profile=False,
            selected_percentile_metrics=[],
            selected_percentiles=[],
            ignore_eos=True,
            goodput_config_dict={},
            max_concurrency=None,
            lora_modules=None,
            extra_headers=None,
            extra_body={"temperature": 0},
            ready_check_timeout_sec=0,
        )
    )
    rows = zip(found["errors"], found["ttfts"], found["latencies"], found["output_lens"], strict=True)
    done = [(first, latency, tokens) for error, first, latency, tokens in rows if not error]
    return {
        "duration": found["duration"],
        "output_tokens": found["total_output_tokens"],
        "first_token": [first for first, _, _ in done],
        # A fast server may send all tokens at once.
        "per_token": [max(latency - first, 1e-9) / max(1, tokens - 1) for first, latency, tokens in done],
        "errors": [error for error in found["errors"] if error],
    }


if __name__ == "__main__":
    main()
