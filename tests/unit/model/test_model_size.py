"""Parameter counts, compared with transformers and manual sums, and over ranks."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

from launch.planning.automatic import compose
from prune_distill.config.composition import config_groups
from prune_distill.model.hf_shape import _MOE_TERMS, _TERMS
from prune_distill.model.model_size import active_parameters, parameters, product_weights, rank_experts, rank_parameters
from prune_distill.model.student import student_shape
from prune_distill.schema import Family, Shape

TINY = Shape(4, 8, 16, 2, 1, 4, 32, 64, False)
# Four experts of 12 channels in each layer, of which a token goes through two.
MIXTURE = dataclasses.replace(TINY, num_moe_experts=4, moe_ffn_hidden_size=12, moe_router_topk=2)
TIED = dataclasses.replace(TINY, tie_word_embeddings=True)
MOE = Family.qwen3_moe
SHIPPED = [name for name in config_groups()["model"] if name != "local"]
# Fits the shortest of them.
SHORT = ("distill=demo", "prune.calibration_seq_length=256")
ODD = dataclasses.replace(TINY, num_attention_heads=6, num_query_groups=3, vocab_size=37, tie_word_embeddings=True)


# In a separate process: after a test has activated the CPU backend, a model on "meta" uses real memory.
COUNT = """
import json, sys, torch
from transformers import AutoConfig, AutoModelForCausalLM
counts = []
for family, values in json.load(sys.stdin):
    with torch.device("meta"):
        counts.append(AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **values)).num_parameters())
print(json.dumps(counts))
"""


def of_transformers(*models: tuple[Shape, Family]) -> list[int]:
    """Return `num_parameters()` of models without storage."""
    asked = [
        (family.value, {theirs: getattr(shape, ours) for ours, theirs in terms(shape).items()})
        for shape, family in models
    ]
    command = [sys.executable, "-c", COUNT]
    done = subprocess.run(command, input=json.dumps(asked), capture_output=True, text=True, check=True, timeout=300)
    counts: list[int] = json.loads(done.stdout.splitlines()[-1])
    return counts


def terms(shape: Shape) -> dict[str, str]:
    return _TERMS | (_MOE_TERMS if shape.num_moe_experts else {})


def test_all_models_are_counted_as_transformers_counts_them() -> None:
    """Every shipped model, every experiment's student, and tiny shapes of each family."""
    models = []
    for name in SHIPPED:
        cfg = compose([f"model={name}", "name=x", "prune.num_layers=2", *SHORT])
        assert cfg.model.shape is not None
        models.append((cfg.model.shape, cfg.model.family))
    for name in sorted({*config_groups()["experiment"]} - {"own"}):
        cfg = compose([f"experiment={name}"])
        models.append((student_shape(cfg), cfg.model.family))
    models += [(shape, family) for shape in (TINY, ODD, TIED) for family in Family if family is not MOE]
    models += [(MIXTURE, MOE), (dataclasses.replace(MIXTURE, tie_word_embeddings=True), MOE)]
    assert [parameters(*model) for model in models] == of_transformers(*models)


def test_by_hand() -> None:
    # A layer: q and o 2 x 8 x 8, k and v 2 x 8 x 4, MLP 3 x 8 x 16 = 576; norms 2 x 8, QK-norms 2 x 4.
    assert parameters(TINY, Family.qwen3) == 4 * (576 + 16 + 8) + 2 * 32 * 8 + 8
    assert parameters(TINY, Family.llama) == 4 * (576 + 16) + 2 * 32 * 8 + 8
    # Biases of q, k and v: 8 + 2 x 4. Without a gate 2 x 8 x 16 in the MLP; three norms with biases.
    assert parameters(TINY, Family.qwen2) == 4 * (576 + 16 + 16) + 2 * 32 * 8 + 8
    assert parameters(TINY, Family.nemotron) == 4 * (448 + 32) + 2 * 32 * 8 + 16
    assert product_weights(TINY, Family.qwen3) == 4 * 576 + 32 * 8


def test_ranks_share_weights_except_norms() -> None:
    assert rank_parameters(TINY, Family.llama, 2) == 4 * (288 + 16) + 2 * 16 * 8 + 8
    first, last = (rank_parameters(TINY, Family.llama, 1, 2, stage) for stage in (0, 1))
    assert first == 2 * (576 + 16) + 32 * 8
    assert last == 2 * (576 + 16) + 8 + 32 * 8
    assert first + last == parameters(TINY, Family.llama)
    assert rank_parameters(TINY, Family.llama, 1, 4, 1) == 576 + 16


def test_a_pipeline_has_two_copies_of_a_tied_embedding() -> None:
    assert parameters(TIED, Family.llama) == parameters(TINY, Family.llama) - 32 * 8
    assert sum(rank_parameters(TIED, Family.llama, 1, 2, stage) for stage in (0, 1)) == parameters(TINY, Family.llama)


def test_active_parameters_are_those_of_the_routed_experts() -> None:
    # A layer: attention 2 x 8 x 8 + 2 x 8 x 4, the router 4 x 8, four experts of 3 x 8 x 12; norms as of Qwen3.
    expert, rest = 288, 192 + 32 + 16 + 8
    assert parameters(MIXTURE, MOE) == 4 * (4 * expert + rest) + 2 * 32 * 8 + 8
    assert active_parameters(MIXTURE, MOE) == 4 * (2 * expert + rest) + 2 * 32 * 8 + 8
    assert product_weights(MIXTURE, MOE) == 4 * (2 * expert + 192 + 32) + 32 * 8
    assert active_parameters(TINY, Family.qwen3) == parameters(TINY, Family.qwen3)


def test_experts_are_distributed_but_not_sharded() -> None:
    assert rank_experts(MIXTURE, MOE) == 4 * 4 * 288
    assert rank_experts(MIXTURE, MOE, 2, 4) == 2 * 288
    assert rank_experts(TINY, Family.qwen3) == 0
    # Attention is cut over tensor-parallel ranks; the router, the norms and a rank's experts are not.
    assert rank_parameters(MIXTURE, MOE, 2, 1, 0, 2) == 4 * (2 * 288 + 192 // 2 + 32 + 24) + 2 * 32 * 8 // 2 + 8


def test_biases_are_sharded_like_their_matrices() -> None:
    # Per rank of two: half of the matrices and of the biases of q, k and v, 8 + 2 x 4; the norms whole.
    assert rank_parameters(TINY, Family.qwen2, 2) == 4 * (288 + 8 + 16) + 2 * 16 * 8 + 8
    assert rank_parameters(TINY, Family.nemotron, 2) == 4 * (224 + 32) + 2 * 16 * 8 + 16
    assert rank_parameters(TINY, Family.qwen3, 2) == 4 * (288 + 16 + 8) + 2 * 16 * 8 + 8
