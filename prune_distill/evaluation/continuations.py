"""A multiple-choice task from a run's held-out documents, in the format of EleutherAI's lm-evaluation-harness.

Which of four continuations follows a text? All four have the same number of words, begin with a word and occur in
held-out documents; the wrong ones come from other documents. Chance is 25 %.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

import yaml  # type: ignore[import-untyped]

from prune_distill.atomic_files import write_text
from prune_distill.config.values import OWN_TASK
from prune_distill.errors import InputError
from prune_distill.schema import Continuations

CHOICES = 4
# Ranked by log-probability, by log-probability per byte, and by mutual information with the context. The last one
# separates small models: the prior probabilities of choices differ more than the effect of a short context.
METRICS = ("acc", "acc_norm", "acc_mutual_info")
# A word. Choices are cut at single spaces, so that no choice stands out by its whitespace.
_WORD = re.compile(r"\S+")


class Question(TypedDict):
    """A multiple-choice question; `answer` is the index of the right choice."""

    context: str
    choices: list[str]
    answer: int


def write_task(documents: Sequence[str], cfg: Continuations, seed: int, folder: Path) -> None:
    """Write the questions and the definition of the task to a folder; the definition last.

    Raises:
        InputError: too few documents are long enough.
    """
    questions = make_questions(documents, cfg, seed)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / f"{OWN_TASK}.jsonl", "".join(json.dumps(question) + "\n" for question in questions))
    write_text(folder / f"{OWN_TASK}.yaml", yaml.safe_dump(_definition(), sort_keys=False))


def make_questions(documents: Sequence[str], cfg: Continuations, seed: int) -> list[Question]:
    """Make `cfg.questions` questions, or fewer if the documents have fewer places for them."""
    draw = random.Random(seed)
    places = {number: found for number, text in enumerate(documents) if (found := _places(text, cfg))}
    if len(places) < CHOICES:
        raise InputError(
            f"evaluate.continuations: needs {CHOICES} held-out documents with {cfg.context_words + cfg.choice_words}"
            f" consecutive words, but only {len(places)} of {len(documents)} have them; add documents, or set"
            " evaluate.continuations=null"
        )
    numbers = list(places)
    draw.shuffle(numbers)
    remaining = {number: draw.sample(found, len(found)) for number, found in places.items()}
    questions: list[Question] = []
    # Round robin over documents, so that the questions do not all come from long ones.
    while len(questions) < cfg.questions and any(remaining.values()):
        for number in numbers:
            if remaining[number] and len(questions) < cfg.questions:
                questions.append(_question(documents, number, remaining[number].pop(), places, draw))
    return questions


def _question(
    documents: Sequence[str],
    number: int,
    place: tuple[int, int, int],
    places: dict[int, list[tuple[int, int, int]]],
    draw: random.Random,
) -> Question:
    start, middle, end = place
    right = documents[number][middle:end]
    wrong: list[str] = []
    others = [other for other in places if other != number]
    for other in draw.sample(others, len(others)) * CHOICES:
        _, begin, stop = draw.choice(places[other])
        text = documents[other][begin:stop]
        if text not in (right, *wrong):
            wrong.append(text)
        if len(wrong) == CHOICES - 1:
            break
    answer = draw.randrange(len(wrong) + 1)
    choices = [*wrong[:answer], right, *wrong[answer:]]
    return {"context": documents[number][start:middle], "choices": choices, "answer": answer}


def _places(text: str, cfg: Continuations) -> list[tuple[int, int, int]]:
    """Find places for questions: the start of the context, its end, and the end of the continuation.

    They do not overlap. A continuation begins with the space before its first word and is one line.
    """
    words = [match.span() for match in _WORD.finditer(text)]
    needed = cfg.context_words + cfg.choice_words
    found, first = [], 0
    while first + needed <= len(words):
        start, middle = words[first][0], words[first + cfg.context_words - 1][1]
        end = words[first + needed - 1][1]
        if re.match(r" [A-Za-z]", text[middle : middle + 2]) and "\n" not in text[middle:end]:
            found.append((start, middle, end))
            first += needed
        else:
            first += 1
    return found


def _definition() -> dict[str, object]:
    # Paths are relative to the working directory: `cd FOLDER && lm_eval run --include_path . --tasks ...`.
    return {
        "task": OWN_TASK,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": f"{OWN_TASK}.jsonl"}, "cache_dir": ".cache"},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{context}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": "",
        "num_fewshot": 0,
        "metric_list": [{"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in METRICS],
        "metadata": {"version": 1.0},
    }
