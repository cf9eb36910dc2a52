"""Completions in shards of prompts, and as training data: rows of whole completions, with a mask of what is learned."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from prune_distill.atomic_files import write_text
from prune_distill.config.values import ON_POLICY
from prune_distill.data.shards import SplitWriter, token_dtype
from prune_distill.data.tokenizer import TokenizerSpec
from prune_distill.generation.engines import Engine, Request
from prune_distill.pipeline.artifact import write_json
from prune_distill.pipeline.names import DATA


@dataclass(frozen=True)
class Completed:
    """A line of a shard: a prompt and its completion as token ids, the completion with its stop token if it ended."""

    prompt: list[int]
    completion: list[int]
    ended: bool


def write_shard(path: Path, engine: Engine, prompts: Sequence[list[int]], first: int, samples: int, seed: int) -> int:
    """Complete the prompts of a shard and write it; return the number of new tokens.

    Args:
        first: number of the first prompt in the round.
        samples: completions of each prompt.
    """
    requests = [
        Request(prompt, sample_seed(seed, first + place, sample))
        for place, prompt in enumerate(prompts)
        for sample in range(samples)
    ]
    completions = engine.complete(requests)
    lines = [
        json.dumps(asdict(Completed(request.prompt, completion.ids, completion.ended)))
        for request, completion in zip(requests, completions, strict=True)
    ]
    write_text(path, "\n".join(lines) + "\n")
    return sum(len(completion.ids) for completion in completions)


def sample_seed(seed: int, prompt: int, sample: int) -> int:
    """Return the seed of a completion, by the seed of the round and the numbers of the prompt and the sample."""
    return int.from_bytes(hashlib.sha256(f"{seed} {prompt} {sample}".encode()).digest()[:4])


def read_shard(path: Path) -> list[Completed]:
    return [Completed(**json.loads(line)) for line in path.read_text().splitlines()]


def write_data(shards: Sequence[Path], out: Path, tokenizer: TokenizerSpec, seq_length: int) -> None:
    """Write a data folder of the completions in shards, `data.json` last; see `prune_distill.data.folder`.

    Each document is a row of `seq_length` tokens, so that Megatron's sequences are these rows.
    """
    partial = out / f".completions.{os.uname().nodename}.{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    ids = SplitWriter(partial / "train", token_dtype(tokenizer.vocab_size), tokenizer.vocab_size)
    masks = SplitWriter(partial / "train_mask", np.dtype(np.uint8), 2)
    counts: Counter[str] = Counter()
    completions = (completed for shard in shards for completed in read_shard(shard))
    for row, learned in pack(count(completions, counts), seq_length, tokenizer.eod_token):
        ids.add([row], (0, 0, 0))
        masks.add([learned], (0, 0, 0))
    written, _ = ids.finish(), masks.finish()
    for path in partial.iterdir():
        if path.suffix != ".documents":
            os.replace(path, out / path.name)
    shutil.rmtree(partial)
    part = {"documents": written.documents, "tokens": written.tokens, "weight": 1.0, "clusters": {}}
    write_json(
        out / DATA,
        {
            "vocab_size": tokenizer.vocab_size,
            "eod_token": tokenizer.eod_token,
            "tokenizer": tokenizer.folder,
            "split_tokens": seq_length,
            "train": [{"prefix": "train", "source": ON_POLICY, **part}],
            "validation": {"documents": 0, "tokens": 0, "bytes": 0, "digests": {}},
            "sources": {ON_POLICY: part},
            "lines": {},
            "completions": summarize(counts, written.tokens),
        },
    )


def pack(completions: Iterable[Completed], seq_length: int, eod: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield rows of token ids and their masks of learned tokens, `[seq_length]`.

    A row holds whole completions, each with its prompt and an end-of-document token, and is padded with that token.
    Learned are the completions, with their stop tokens; nothing is learned about the end of one that was cut off.
    """
    row: list[int] = []
    mask: list[int] = []
    for completed in completions:
        ids, learned = [*completed.prompt, *completed.completion], [0] * len(completed.prompt)
        learned += [1] * len(completed.completion)
        if ids[-1] != eod:
            ids, learned = [*ids, eod], [*learned, 0]
        if len(row) + len(ids) > seq_length:
            yield _padded(row, mask, seq_length, eod)
            row, mask = [], []
        row += ids
        mask += learned
    if row:
        yield _padded(row, mask, seq_length, eod)


def _padded(row: list[int], mask: list[int], length: int, eod: int) -> tuple[np.ndarray, np.ndarray]:
    padding = length - len(row)
    return np.array([*row, *[eod] * padding], np.int64), np.array([*mask, *[0] * padding], np.uint8)


def count(completions: Iterable[Completed], counts: Counter[str]) -> Iterator[Completed]:
    """Yield completions, and add to `counts`: completions, those that ended at once or were cut off, and tokens."""
    for completed in completions:
        tokens = len(completed.completion)
        counts.update(
            completions=1,
            empty=completed.ended and tokens <= 1,
            truncated=not completed.ended,
            completion_tokens=tokens,
            prompt_tokens=len(completed.prompt),
        )
        yield completed


def summarize(counts: Mapping[str, int], tokens: int) -> dict[str, Any]:
    """Return the metrics of completions; `tokens`: all tokens of their rows."""
    used = counts["prompt_tokens"] + counts["completion_tokens"]
    return {**counts, "tokens": tokens, "padding_share": round(1 - used / tokens, 4)}
