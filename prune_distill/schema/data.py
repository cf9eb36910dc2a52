"""Documents: where they are, how they are read and how they become sequences."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from omegaconf import MISSING

from prune_distill.schema.fields import placement


class DocumentFormat(Enum):
    """What a record holds.

    `text`: a text. `tokens`: ids of `data.source_tokenizer`, as in nvidia/ClimbMix. `chat`: a list of messages with
    `role` and `content`, which the model's chat template renders.
    """

    text = "text"
    tokens = "tokens"
    chat = "chat"


class LongDocuments(Enum):
    """What becomes of what is beyond `max_document_tokens`: it is cut off, or makes further documents."""

    cut = "cut"
    split = "split"


@dataclass
class DataSource:
    """One source of training documents, and its share. All sources have a `weight`, or none has."""

    # Files, folders or globs; or files in a dataset on the Hub: hf://datasets/OWNER/NAME[@REVISION]/GLOB.
    files: list[str] = MISSING
    format: DocumentFormat = DocumentFormat.text
    # Field of the document; null: text, tokens or messages, as the format is.
    key: str | None = None
    # Share of the tokens that training reads, in proportion to the others'; null: as many as there are.
    weight: float | None = None
    # Tokens to take at most, chosen at random among all of the source's documents; null: all. The whole source is
    # tokenised first: of a much larger one take a `sample` as well.
    max_tokens: int | None = None
    # Share of the documents that is taken, chosen at random, before they are tokenised.
    sample: float = 1.0


@dataclass
class DataConfig:
    """Documents for calibration, distillation and validation: JSON lines (also .gz, .zst) or parquet."""

    # One source: files, folders, globs or hf://datasets/...; null where the demo's corpus or `sources` is used.
    train: list[str] | None = None
    # Several sources by name, instead of `train`.
    sources: dict[str, DataSource] | None = None
    # As `train`; null: one in `holdout_every` documents of the sources, chosen by a hash of its text.
    validation: list[str] | None = None
    # Null: 10, 100, 1000 or 10,000, the largest of them that holds out 1 MB of the sources' files, or else 10.
    holdout_every: int | None = None
    # Of `train` and `validation`; a source of `sources` says its own.
    format: DocumentFormat = DocumentFormat.text
    text_key: str = "text"
    sample: float = 1.0
    # Hugging Face folder or Hub id of the tokenizer whose ids documents of the format `tokens` hold.
    source_tokenizer: str = "openai-community/gpt2"
    # Field with a whole number by which tokens are counted, such as ClimbMix's topic.
    cluster_key: str = "cluster_id"
    # Longer documents are cut, or split, at this many tokens, end-of-document not counted.
    max_document_tokens: int = 32000
    long_documents: LongDocuments = LongDocuments.cut
    # Of chat: whether loss is taken on what the assistant says only.
    mask_prompts: bool = False
    # Leaves out documents whose text was there before, in all sources together.
    deduplicate: bool = False
    # Share of a shard's lines that may be broken (bad JSON, no text) before the stage fails. Not part of the identity:
    # a complete stage is redone only where a shard of it has more.
    max_bad_share: float = placement(0.001)
    # Bytes of files that are worked on at a time and make one pair of .bin/.idx; a compressed file is never divided.
    shard_bytes: int = 512 * 2**20
    # Processes of a node; null: one a core.
    num_workers: int | None = placement(None)
    # Nodes that share the work under Slurm, each a task of a job array.
    array_tasks: int = placement(1)
    # Seconds without a sign of life after which another node takes over what a node was working on.
    stale_seconds: int = placement(300)
