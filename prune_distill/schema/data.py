"""Documents: where they are, how they are read and how they become sequences."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Annotated

from omegaconf import MISSING

from prune_distill.schema.fields import (
    PositiveFloat,
    PositiveInt,
    Range,
    ShareAboveZero,
    ShareBelowOne,
    Text,
    hashed_elsewhere,
    hashed_if,
    placement,
)
from prune_distill.schema.model import TeacherConfig


class DocumentFormat(Enum):
    """The content of a record.

    `text`: a text. `tokens`: token ids of `data.source_tokenizer`, as in nvidia/ClimbMix. `chat`: a list of messages
    with `role` and `content`, which the model's chat template renders with the record's `tools`. `ids`: token ids of
    the model's own tokenizer, with an optional list `loss_mask` of 1 for tokens that are learned and 0 for others.
    """

    text = "text"
    tokens = "tokens"
    chat = "chat"
    ids = "ids"


class LongDocuments(Enum):
    """What happens to a document longer than `max_document_tokens`: the tokens after it are dropped (`truncate`) or
    become further documents (`split`), or the whole document is dropped (`drop`). Parts without a learned token are
    dropped."""

    truncate = "truncate"
    split = "split"
    drop = "drop"


class Learn(Enum):
    """Which tokens of chat documents are learned: all (`all`), what the assistant writes (`assistant`), or what it
    writes in its last turn (`last_assistant`). Thinking and tool calls are part of what it writes."""

    all = "all"
    assistant = "assistant"
    last_assistant = "last_assistant"


@dataclass
class DataSource:
    """One source of training documents. Either all sources have a `weight`, or none has one."""

    # Files, folders, globs, or files of a dataset on the Hub as hf://datasets/OWNER/NAME[@REVISION]/GLOB.
    files: list[str] = MISSING
    format: DocumentFormat = DocumentFormat.text
    # Field of the document in a record; null: `text`, `tokens`, or `messages` or else `conversations`, by the format.
    key: str | None = None
    # Share of the training tokens, relative to the weights of the other sources; null: every source is read once.
    weight: PositiveFloat | None = None
    # Upper limit of tokens, drawn at random from all documents of the source; null: all tokens. The whole source is
    # tokenized first, so set `sample` as well for a much larger source.
    max_tokens: PositiveInt | None = None
    # Share of the documents to use, drawn at random before they are tokenized.
    sample: ShareAboveZero = 1.0
    # Teacher of the source's sequences, with distill.teacher_logits=cached; null: the teacher of the run. Part of the
    # identity of the stages cache_logits, whose inputs are the teachers.
    teacher: TeacherConfig | None = hashed_elsewhere(None)


@dataclass
class DataConfig:
    """Documents for calibration, distillation and validation: JSON lines (also .gz, .zst) or parquet."""

    # Training documents: files, folders, globs or hf://datasets/OWNER/NAME[@REVISION]/GLOB; null: `sources` or the
    # demo's corpus is used.
    train: list[str] | None = None
    # Several sources of training documents by name, instead of `train`.
    sources: dict[str, DataSource] | None = None
    # Validation documents, in the same forms as `train`; null: one in `holdout_every` training documents is held out,
    # chosen by a hash of its text.
    validation: list[str] | None = None
    # Holds out one in so many documents; null: the largest of 10, 100, 1000 and 10,000 that holds out 1 MB of the
    # sources' files, or else 10.
    holdout_every: Annotated[int, Range(at_least=2, problem="would hold out every document")] | None = None
    # Format of `train` and `validation`; each of `sources` has its own format.
    format: DocumentFormat = DocumentFormat.text
    # Field of the document in a record of `train` and `validation`.
    text_key: Text = "text"
    # Share of the documents of `train` to use, drawn at random before they are tokenized.
    sample: ShareAboveZero = 1.0
    # Hugging Face folder or Hub id of the tokenizer of documents in the format `tokens`.
    source_tokenizer: str = "openai-community/gpt2"
    # Field with an integer, such as ClimbMix's topic, by which tokens are counted and held-out losses reported.
    cluster_key: str = "cluster_id"
    # Longest document in tokens, without the end-of-document token.
    max_document_tokens: PositiveInt = 32000
    long_documents: LongDocuments = LongDocuments.truncate
    learn: Learn = Learn.all
    # Whether turns of the assistant that the chat template renders differently once messages follow become documents of
    # their own: the conversation up to the turn, as the model sees it. Qwen3's template drops the thinking of earlier
    # turns, which is then learned only so. Needs `learn=assistant`.
    split_turns: bool = hashed_if(False, lambda data: data.learn is Learn.assistant)
    # Drops documents whose text occurred before in any source.
    deduplicate: bool = False
    # Share of a shard's lines that may be broken (bad JSON, no text) before the stage fails. It is not part of the
    # identity: a complete stage is redone only where one of its shards has more.
    max_invalid_fraction: ShareBelowOne = placement(0.001)
    # Bytes of input files that are processed as one unit and become one pair of .bin and .idx files. A compressed file
    # is never divided.
    shard_bytes: PositiveInt = 512 * 2**20
    # Processes per node; null: one per core.
    num_workers: PositiveInt | None = placement(None)
    # Nodes that share the work under Slurm, each a task of a job array.
    array_tasks: PositiveInt = placement(1)
    # Seconds without a sign of life after which another node takes over a node's shard.
    stale_seconds: PositiveInt = placement(300)
