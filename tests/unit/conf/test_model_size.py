"""Counting parameters: by transformers, by hand, and over ranks."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from conf.composition import config_groups
from conf.hf_shape import _TERMS
from conf.load import compose
from conf.model_size import parameters, product_weights, rank_parameters
from conf.schema import Family, Shape
from conf.validate import student_shape

TINY = Shape(4, 8, 16, 2, 1, 4, 32, 64, False)
SHIPPED = [name for name in config_groups()["model"] if name != "local"]
ODD = dataclasses.replace(TINY, num_attention_heads=6, num_query_groups=3, vocab_size=37, tie_word_embeddings=True)


def of_transformers(shape: Shape, family: Family) -> int:
    """`num_parameters()` of a model that has no storage."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    values: dict[str, Any] = {theirs: getattr(shape, ours) for ours, theirs in _TERMS.items()}
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(family.value, **values)).num_parameters()


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_model_is_counted_as_transformers_counts_it(name: str) -> None:
    shortest = ["distill=demo", "prune.calibration_seq_length=256"]
    cfg = compose([f"model={name}", "name=x", "prune.num_layers=2", *shortest])
    assert cfg.model.shape is not None
    assert parameters(cfg.model.shape, cfg.model.family) == of_transformers(cfg.model.shape, cfg.model.family)


@pytest.mark.parametrize("name", config_groups()["experiment"])
def test_students_too(name: str) -> None:
    cfg = compose([f"experiment={name}"])
    student = student_shape(cfg)
    assert parameters(student, cfg.model.family) == of_transformers(student, cfg.model.family)


@pytest.mark.parametrize("family", list(Family))
@pytest.mark.parametrize("shape", [TINY, ODD, dataclasses.replace(TINY, tie_word_embeddings=True)])
def test_tiny_shapes(shape: Shape, family: Family) -> None:
    assert parameters(shape, family) == of_transformers(shape, family)


def test_by_hand() -> None:
    # A layer: q and o 2 x 8 x 8, k and v 2 x 8 x 4, MLP 3 x 8 x 16 = 576; norms 2 x 8, QK-norms 2 x 4.
    assert parameters(TINY, Family.qwen3) == 4 * (576 + 16 + 8) + 2 * 32 * 8 + 8
    assert parameters(TINY, Family.llama) == 4 * (576 + 16) + 2 * 32 * 8 + 8
    assert product_weights(TINY) == 4 * 576 + 32 * 8


def test_ranks_share_weights_and_each_has_the_norms() -> None:
    assert rank_parameters(TINY, Family.llama, 2) == 4 * (288 + 16) + 2 * 16 * 8 + 8
    first, last = (rank_parameters(TINY, Family.llama, 1, 2, stage) for stage in (0, 1))
    assert first == 2 * (576 + 16) + 32 * 8
    assert last == 2 * (576 + 16) + 8 + 32 * 8
    assert first + last == parameters(TINY, Family.llama)
    assert rank_parameters(TINY, Family.llama, 1, 4, 1) == 576 + 16


def test_a_tied_embedding_is_there_twice_in_a_pipeline() -> None:
    tied = dataclasses.replace(TINY, tie_word_embeddings=True)
    assert parameters(tied, Family.llama) == parameters(TINY, Family.llama) - 32 * 8
    assert sum(rank_parameters(tied, Family.llama, 1, 2, stage) for stage in (0, 1)) == parameters(TINY, Family.llama)
