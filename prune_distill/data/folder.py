"""Prepared documents: Megatron's `.bin/.idx` in shards, and `data.json`, which lists them.

Each document consists of its tokens and one end-of-document token. Megatron's dataset classes read the files directly.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from prune_distill.config.values import OFF_POLICY, ON_POLICY
from prune_distill.data.documents import NO_CLUSTER
from prune_distill.data.shards import bad_share, read_document_info, read_documents, read_manifest
from prune_distill.pipeline.names import DATA, SHARDS


@dataclass(frozen=True)
class DataFolder:
    """The output of `prepare_data`. Token counts include end-of-document tokens.

    Attributes:
        train: for each part of the training documents, its `prefix` (without `.bin` or `.idx`), `source`, `documents`,
            `tokens` and `weight`.
        sources: documents, tokens, weight and tokens by cluster, by source.
        lines: counts of the lines that were read, as in `readers.Lines`.
    """

    folder: Path
    vocab_size: int
    eod_token: int
    train: list[dict[str, Any]]
    validation_documents: int
    validation_tokens: int
    validation_bytes: int
    sources: dict[str, Any]
    lines: dict[str, Any]

    @classmethod
    def read(cls, folder: Path) -> DataFolder:
        content = json.loads((folder / DATA).read_text())
        return cls(
            folder,
            content["vocab_size"],
            content["eod_token"],
            content["train"],
            content["validation"]["documents"],
            content["validation"]["tokens"],
            content["validation"]["bytes"],
            content["sources"],
            content["lines"],
        )

    @property
    def worst_bad_share(self) -> float:
        """Largest fraction of invalid lines in a shard."""
        shards = (shard for shard in (self.folder / SHARDS).iterdir() if shard.name.isdigit())
        return max((bad_share(read_manifest(shard)) for shard in shards), default=0.0)

    @property
    def train_documents(self) -> int:
        return sum(part["documents"] for part in self.train)

    @property
    def train_tokens(self) -> int:
        return sum(part["tokens"] for part in self.train)

    @property
    def masked(self) -> bool:
        """Whether some tokens are masked (`data.learn`)."""
        return any((self.folder / f"{part['prefix']}_mask.idx").exists() for part in self.train)

    @property
    def train_paths(self) -> list[str]:
        """The training documents in Megatron's format: one prefix, or weights and prefixes."""
        prefixes = [str(self.folder / part["prefix"]) for part in self.train]
        if len(prefixes) == 1:
            return prefixes
        weights = [repr(float(part["weight"])) for part in self.train]
        return [word for pair in zip(weights, prefixes, strict=True) for word in pair]

    def weighted(self, weights: dict[str, float]) -> DataFolder:
        """Return the folder with other weights by source; sources without a weight, or with 0, are excluded.

        Raises:
            KeyError: an unknown source.
        """
        tokens = {name: self.sources[name]["tokens"] for name, weight in weights.items() if weight}
        parts = []
        for part in self.train:
            weight, all_tokens = weights.get(part["source"]), tokens.get(part["source"])
            if weight and all_tokens:
                # Tokens decide within a source, except for one that stands for several (`joined`).
                own = weight * part["share"] if "share" in part else weight * part["tokens"] / all_tokens
                parts.append({**part, "weight": own})
        return dataclasses.replace(self, train=parts)

    def joined(self, completions: DataFolder) -> DataFolder:
        """Return a folder with two sources: the training documents of this one, and a student's completions.

        Their weights are those of a phase (`prune_distill.config.values.on_policy_settings`). Validation stays this
        folder's.
        """
        train = []
        for source, data in ((OFF_POLICY, self), (ON_POLICY, completions)):
            total = sum(part["weight"] for part in data.train)
            for part in data.train:
                place = {"prefix": str((data.folder / part["prefix"]).absolute()), "source": source}
                train.append({**part, **place, "share": part["weight"] / total})
        tokens = {OFF_POLICY: {"tokens": self.train_tokens}, ON_POLICY: {"tokens": completions.train_tokens}}
        return dataclasses.replace(self, train=train, sources=tokens)

    @property
    def validation_paths(self) -> list[str]:
        return [str(self.folder / "validation")]

    def tokens(self, split: str) -> np.ndarray:
        """Return all tokens of a split, concatenated: `[tokens]` int64."""
        prefixes = [part["prefix"] for part in self.train] if split == "train" else ["validation"]
        documents = [document for prefix in prefixes for document in read_documents(self.folder / prefix)]
        return np.concatenate(documents).astype(np.int64)

    def validation_documents_ids(self) -> list[np.ndarray]:
        """Return the ids of each validation document, `[tokens]`, with its end-of-document token."""
        return list(read_documents(self.folder / "validation"))

    def validation_groups(self) -> tuple[list[str], np.ndarray] | None:
        """Return the source, or else the cluster, of each token of the validation documents.

        Returns:
            Names, and the index of each token's name, `[tokens]`; None if there is only one name.
        """
        names: list[tuple[str, int]] = []
        # The order in which `declare` merged the documents.
        shards = [shard for shard in (self.folder / SHARDS).iterdir() if shard.name.isdigit()]
        for shard in sorted(shards, key=lambda shard: int(shard.name)):
            if (shard / "validation.documents").exists():
                source = read_manifest(shard)["source"]
                names += [(source, int(cluster)) for cluster in read_document_info(shard / "validation")["cluster"]]
        lengths = [len(document) for document in self.validation_documents_ids()]
        if len(names) != len(lengths):
            raise ValueError(f"{self.folder}: {len(lengths)} held-out documents, but {len(names)} in its shards")
        kinds = _kinds(names)
        found = sorted(set(kinds))
        if len(found) < 2:
            return None
        return found, np.repeat([found.index(kind) for kind in kinds], lengths)

    def validation_sequences(self, seq_length: int) -> np.ndarray:
        """Return the concatenated validation documents, cut into sequences.

        Returns:
            `[sequences, seq_length + 1]` int64: inputs are all but the last column, targets all but the first. An
            incomplete last sequence is dropped.
        """
        tokens = self.tokens("validation")
        count = max(0, len(tokens) - 1) // seq_length
        starts = np.arange(count)[:, None] * seq_length
        return tokens[starts + np.arange(seq_length + 1)]


def _kinds(documents: list[tuple[str, int]]) -> list[str]:
    """Return the names that distinguish documents: their sources if they differ, else their clusters."""
    if len({source for source, _ in documents}) > 1:
        return [source for source, _ in documents]
    return ["no cluster" if cluster == NO_CLUSTER else f"cluster {cluster}" for _, cluster in documents]


def read_training_data(data: Path, completions: Path | None) -> DataFolder:
    """Read prepared data, joined with the student's completions in an on-policy round."""
    folder = DataFolder.read(data)
    return folder if completions is None else folder.joined(DataFolder.read(completions))
