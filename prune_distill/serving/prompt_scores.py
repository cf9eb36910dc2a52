"""Log-probabilities of the tokens of texts, from a vLLM server."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from prune_distill.serving.server import RequestError, ask

# A sequence may wait for others.
SECONDS = 3600


def score_sequences(
    url: str, model: str, sequences: Sequence[list[int]], parallel: int
) -> tuple[list[list[float]], list[list[int]]]:
    """Return the log-probability of each token but the first, and the most probable token in its place.

    Args:
        url: the server's, such as http://127.0.0.1:8000.
        parallel: number of requests at the same time.

    Raises:
        RequestError: the server cannot be reached, refuses a request (a sequence may be too long for it), or is not
            vLLM's.
    """
    with ThreadPoolExecutor(parallel) as threads:
        scores = list(threads.map(lambda ids: _score(url, model, ids), sequences))
    return [score[0] for score in scores], [score[1] for score in scores]


def _score(url: str, model: str, ids: list[int]) -> tuple[list[float], list[int]]:
    """Score a sequence. Its last token is not sent, because a model's context may hold one token less: the server has
    to generate it, and tells its log-probability as if all tokens were allowed (vLLM's `raw_logprobs`)."""
    content = {"model": model, "prompt": ids[:-1], "max_tokens": 1, "echo": True, "logprobs": 1, "temperature": 0}
    content |= {"allowed_token_ids": ids[-1:], "return_tokens_as_token_ids": True}
    answer = ask(f"{url}/v1/completions", content, SECONDS)
    try:
        found: dict[str, Any] = answer["choices"][0]["logprobs"]
        tokens = [_id(token) for token in found["tokens"]]
        top = [_id(max(entry, key=entry.__getitem__)) for entry in found["top_logprobs"][1:]]
        log_probs = [float(value) for value in found["token_logprobs"][1:]]
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise RequestError(
            f"{url}: the answer has no log-probabilities of tokens by id; use a server of vLLM"
        ) from error
    if tokens != ids:
        raise RequestError(f"{url}: the answer is about other tokens than the request; use a server of vLLM")
    return log_probs, top


def _id(token: str) -> int:
    """Return the id in a token's name, `token_id:N`."""
    return int(token.removeprefix("token_id:"))
