"""PYTHON -P child.py PID vllm_worker.py

Generate with vLLM for another process. The first line of the standard input contains vLLM's settings as JSON. Each
further line requests a generation, and gets one line of JSON as its answer. The process ends with its input.

It runs in the serving environment, which has none of this repository's libraries, so it only imports vLLM.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

import vllm


def main() -> None:
    answers = os.fdopen(int(sys.argv[1]), "w")
    llm = vllm.LLM(**json.loads(sys.stdin.readline()))
    dtype = str(llm.model_config.dtype).removeprefix("torch.")
    _answer(answers, {"version": vllm.__version__, "dtype": dtype})
    for line in sys.stdin:
        request = json.loads(line)
        work = _sample if "sampling" in request else _generate
        _answer(answers, work(llm, **request))


def _answer(answers: Any, content: dict[str, Any]) -> None:
    answers.write(json.dumps(content) + "\n")
    answers.flush()


def _sample(llm: Any, prompts: list[list[int]], seeds: list[int], sampling: dict[str, Any]) -> dict[str, Any]:
    """Sample a completion of each prompt with its own seed.

    Returns:
        `tokens`, the new ids of each prompt, with the stop token if it ended; `ended`, whether the model ended it.
    """
    parameters = [vllm.SamplingParams(**sampling, seed=seed, detokenize=False) for seed in seeds]
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], parameters, use_tqdm=False)
    completions = [output.outputs[0] for output in outputs]
    return {
        "tokens": [list(completion.token_ids) for completion in completions],
        "ended": [completion.finish_reason == "stop" for completion in completions],
    }


def _generate(llm: Any, prompts: list[list[int]], new_tokens: int, prompt_log_probs: bool) -> dict[str, Any]:
    """Generate greedily.

    Returns:
        `seconds`; `tokens`, the new ids of each prompt; if requested, `log_probs` of each prompt's tokens but the
        first.
    """
    parameters = vllm.SamplingParams(
        temperature=0.0,
        min_tokens=new_tokens,
        max_tokens=new_tokens,
        ignore_eos=True,
        detokenize=False,
        prompt_logprobs=0 if prompt_log_probs else None,
    )
    started = time.perf_counter()
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], parameters, use_tqdm=False)
    content: dict[str, Any] = {"seconds": time.perf_counter() - started}
    content["tokens"] = [list(output.outputs[0].token_ids) for output in outputs]
    if prompt_log_probs:
        # vLLM may also return the most probable token of each position.
        content["log_probs"] = [
            [entry[token].logprob for token, entry in zip(ids[1:], output.prompt_logprobs[1:], strict=True)]
            for ids, output in zip(prompts, outputs, strict=True)
        ]
    return content


if __name__ == "__main__":
    main()
