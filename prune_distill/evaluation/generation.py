"""Generate continuations of held-out documents, as samples for people to read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from prune_distill.data.folder import DataFolder
from prune_distill.evaluation.results import SampleTexts
from prune_distill.schema import EvaluateConfig


@dataclass(frozen=True)
class Prompts:
    """Prompts from held-out documents, `[n, prompt tokens]`, and their original continuations, n arrays of ids."""

    ids: np.ndarray
    following: list[np.ndarray]

    @classmethod
    def read(cls, data: DataFolder, cfg: EvaluateConfig) -> Prompts:
        """Select the beginnings of `cfg.samples` documents, evenly spaced among those that are long enough."""
        prompt, new = cfg.sample_prompt_tokens, cfg.sample_new_tokens
        documents = [ids for ids in data.validation_documents_ids() if len(ids) > prompt]
        longest = [ids for ids in documents if len(ids) > prompt + new] or documents
        count = min(cfg.samples, len(longest))
        chosen = [longest[number * len(longest) // count] for number in range(count)]
        ids = np.array([document[:prompt] for document in chosen], dtype=np.int64).reshape(count, prompt)
        return cls(ids, [np.asarray(document[prompt : prompt + new], dtype=np.int64) for document in chosen])


def generate_continuations(model: Any, tokenizer: Any, prompts: Prompts, new_tokens: int) -> list[str]:
    """Generate greedy continuations, up to the end-of-text token."""
    if not len(prompts.ids):
        return []
    ids = torch.from_numpy(prompts.ids).to(model.device)
    with torch.inference_mode():
        generated = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        )
    return [tokenizer.decode(row[ids.shape[1] :], skip_special_tokens=True) for row in generated]


def build_samples(tokenizer: Any, prompts: Prompts, texts: dict[str, list[str]]) -> list[SampleTexts]:
    """Return the content of `samples.json`; `texts`: one text per prompt for each model."""
    return [
        {
            "prompt": tokenizer.decode(ids, skip_special_tokens=True),
            "reference": tokenizer.decode(following, skip_special_tokens=True),
            "texts": {name: own[number] for name, own in texts.items()},
        }
        for number, (ids, following) in enumerate(zip(prompts.ids, prompts.following, strict=True))
    ]
