"""The Transformer Engine stand-in under tensor, sequence, context and data parallelism, on gloo ranks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.helpers.ranks import RankError, run_ranks

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the stand-in is for machines without CUDA")

# fp32 sums over 64 to 256 terms in another order: a few times 2^-23 of values of order 1.
ROUNDING = {"rtol": 1e-4, "atol": 1e-5}


# --- modules against the same module on one rank --------------------------------------------------------------------


def _cut(tensor: torch.Tensor, dim: int, parts: int, rank: int) -> torch.Tensor:
    return tensor.detach().chunk(parts, dim)[rank].contiguous()


def _linear(mode: str, sequence_parallel: bool, normed: bool) -> None:
    from prune_distill.nemo import backend

    backend.activate()
    import torch.distributed as dist
    from transformer_engine.pytorch import LayerNormLinear, Linear

    layer, options = (LayerNormLinear, {"normalization": "RMSNorm"}) if normed else (Linear, {})
    torch.manual_seed(0)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    whole = layer(64, 32, parallel_mode=mode, **options)
    part = layer(
        64, 32, parallel_mode=mode, tp_group=dist.group.WORLD, tp_size=2, sequence_parallel=sequence_parallel, **options
    )
    weight_dim = 1 if mode == "row" else 0
    with torch.no_grad():
        whole.bias.normal_()
        part.weight.copy_(_cut(whole.weight, weight_dim, ranks, rank))
        part.bias.copy_(_cut(whole.bias, 0, ranks, rank) if mode == "column" else whole.bias)
    x, grad = torch.randn(8, 2, 64), torch.randn(8, 2, 32)

    # What a rank holds of input and output: features on the split side, the sequence on the other where it is split.
    sequence_dim = 0 if sequence_parallel else None
    dims = {"column": (sequence_dim, 2), "row": (2, sequence_dim)}[mode]
    mine: Callable[[torch.Tensor, int | None], torch.Tensor] = lambda t, dim: (  # noqa: E731
        t.clone() if dim is None else _cut(t, dim, ranks, rank)
    )
    x_whole, x_part = x.clone().requires_grad_(), mine(x, dims[0]).requires_grad_()
    y_whole, y_part = whole(x_whole), part(x_part)
    y_whole.backward(grad)
    y_part.backward(mine(grad, dims[1]))

    torch.testing.assert_close(y_part, mine(y_whole.detach(), dims[1]), **ROUNDING)
    torch.testing.assert_close(x_part.grad, mine(x_whole.grad, dims[0]), **ROUNDING)
    torch.testing.assert_close(part.weight.grad, _cut(whole.weight.grad, weight_dim, ranks, rank), **ROUNDING)
    assert (part.weight.tensor_model_parallel, part.weight.partition_dim) == (True, weight_dim)
    for name in ("bias", "layer_norm_weight"):
        _check_small_parameter(name, whole, part, mode, rank)


def _check_small_parameter(name: str, whole: Any, part: Any, mode: str, rank: int) -> None:
    """Gradients of what is not cut are partial sums under sequence parallelism, and marked for Megatron to add up."""
    import torch.distributed as dist

    if not hasattr(whole, name):
        return
    expected, grad = getattr(whole, name).grad, getattr(part, name).grad.clone()
    if name == "bias" and mode == "column":
        expected = _cut(expected, 0, 2, rank)
    elif part.sequence_parallel:
        assert getattr(part, name).sequence_parallel
        dist.all_reduce(grad)
    torch.testing.assert_close(grad, expected, **ROUNDING)


def _linears(sequence_parallel: bool) -> None:
    for mode, normed in (("column", False), ("row", False), ("column", True)):
        _linear(mode, sequence_parallel, normed)


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["tp2", "tp2_sp"])
def test_linear_layers_split_over_two_ranks(sequence_parallel: bool) -> None:
    run_ranks(_linears, 2, sequence_parallel)


def _attentions() -> None:
    for mask_type in ("causal", "no_mask"):
        _attention(mask_type)


def _attention(mask_type: str) -> None:
    from prune_distill.nemo import backend

    backend.activate()
    import torch.distributed as dist
    from transformer_engine.pytorch import DotProductAttention

    torch.manual_seed(0)
    rank = dist.get_rank()
    heads, groups, size, length = 4, 2, 16, 24
    query, key = torch.randn(length, 2, heads, size), torch.randn(length, 2, groups, size)
    value, grad = torch.randn(length, 2, groups, size), torch.randn(length, 2, heads * size)

    def own(tensor: torch.Tensor) -> torch.Tensor:
        first, second = tensor.detach().chunk(4)[rank], tensor.detach().chunk(4)[3 - rank]
        return torch.cat((first, second))

    whole = DotProductAttention(heads, size, groups, attn_mask_type=mask_type)
    part = DotProductAttention(heads, size, groups, attn_mask_type=mask_type, cp_group=dist.group.WORLD)
    inputs = [tensor.requires_grad_() for tensor in (query, key, value)]
    own_inputs = [own(tensor).requires_grad_() for tensor in inputs]
    expected, output = whole(*inputs), part(*own_inputs)
    expected.backward(grad)
    output.backward(own(grad))
    torch.testing.assert_close(output, own(expected), **ROUNDING)
    for mine, other in zip(own_inputs, inputs, strict=True):
        torch.testing.assert_close(mine.grad, own(other.grad), **ROUNDING)


def test_attention_over_two_context_parallel_ranks() -> None:
    run_ranks(_attentions, 2)


def _dropout_states() -> tuple[list[bool], list[bool]]:
    from prune_distill.nemo import backend

    backend.activate()
    from megatron.core import parallel_state, tensor_parallel
    from transformer_engine.pytorch import DotProductAttention

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    torch.manual_seed(7)
    tensor_parallel.model_parallel_cuda_manual_seed(7)
    attention = DotProductAttention(
        8, 4, attention_dropout=0.5, tp_size=2, get_rng_state_tracker=tensor_parallel.get_cuda_rng_tracker
    )
    ones = torch.ones(16, 1, 4, 4)
    inside = attention(ones, ones, ones).flatten() > 1
    outside = torch.rand(16) > 0.5
    return inside.tolist(), outside.tolist()


def test_dropout_differs_between_tensor_parallel_ranks_inside_attention_alone() -> None:
    (inside_0, outside_0), (inside_1, outside_1) = run_ranks(_dropout_states, 2)
    assert inside_0 != inside_1
    assert outside_0 == outside_1


# --- a whole model against transformers -----------------------------------------------------------------------------

VOCABULARY, LENGTH, BATCH, STEPS = 96, 32, 4, 4
LEARNING_RATE, MAX_NORM = 1e-2, 0.5
# About a clipped gradient's size: with Adam's usual 1e-8 a weight whose gradient is rounding alone moves a whole step.
ADAM_EPS = 1e-3


def _hf_model() -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(1)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
        attn_implementation="eager",
        rope_theta=1e4,
    )
    model = Qwen3ForCausalLM(config).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:  # else all ones
                parameter.uniform_(0.5, 1.5)
    return model


def _batch() -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (BATCH, LENGTH), generator=torch.Generator().manual_seed(2))


def _train_hf() -> tuple[Any, list[float]]:
    model, tokens = _hf_model(), _batch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, eps=ADAM_EPS, weight_decay=0.0)
    losses = []
    for _ in range(STEPS):
        logits = model(tokens).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.roll(-1, 1).flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        losses.append(loss.item())
    return model, losses


def _megatron_weights(hf: Any, rank: int, ranks: int) -> dict[str, torch.Tensor]:
    """The Hugging Face weights under Megatron's names, this tensor-parallel rank's part of each."""
    source = hf.state_dict()
    column = lambda tensor: _cut(tensor, 0, ranks, rank)  # noqa: E731
    row = lambda tensor: _cut(tensor, 1, ranks, rank)  # noqa: E731
    weights = {
        "embedding.word_embeddings.weight": column(source["model.embed_tokens.weight"]),
        "decoder.final_layernorm.weight": source["model.norm.weight"],
        "output_layer.weight": column(source["lm_head.weight"]),
    }
    for layer in range(hf.config.num_hidden_layers):
        ours, theirs = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        qkv = [source[f"{theirs}self_attn.{name}_proj.weight"] for name in "qkv"]
        groups = hf.config.num_key_value_heads
        grouped = torch.cat([part.unflatten(0, (groups, -1)) for part in qkv], dim=1).flatten(0, 1)
        gate_up = [source[f"{theirs}mlp.{name}_proj.weight"] for name in ("gate", "up")]
        weights |= {
            f"{ours}self_attention.linear_qkv.layer_norm_weight": source[f"{theirs}input_layernorm.weight"],
            f"{ours}self_attention.linear_qkv.weight": column(grouped),
            f"{ours}self_attention.q_layernorm.weight": source[f"{theirs}self_attn.q_norm.weight"],
            f"{ours}self_attention.k_layernorm.weight": source[f"{theirs}self_attn.k_norm.weight"],
            f"{ours}self_attention.linear_proj.weight": row(source[f"{theirs}self_attn.o_proj.weight"]),
            f"{ours}mlp.linear_fc1.layer_norm_weight": source[f"{theirs}post_attention_layernorm.weight"],
            f"{ours}mlp.linear_fc1.weight": torch.cat([column(part) for part in gate_up]),
            f"{ours}mlp.linear_fc2.weight": row(source[f"{theirs}mlp.down_proj.weight"]),
        }
    return weights


def _megatron_model(backend_config: dict[str, Any], layout: dict[str, Any]) -> Any:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
    from megatron.core.transformer import TransformerConfig

    config = TransformerConfig(
        num_layers=2,
        hidden_size=64,
        ffn_hidden_size=96,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=32,
        qk_layernorm=True,
        normalization="RMSNorm",
        layernorm_epsilon=1e-6,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        bias_activation_fusion=True,
        # Fused, Megatron rounds the gradient of the logits to bf16 (megatron/core/fusions/fused_cross_entropy.py:82).
        cross_entropy_loss_fusion=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        pipeline_dtype=torch.float32,
        **backend_config,
        **layout,
    )
    return GPTModel(
        config,
        get_gpt_layer_with_transformer_engine_spec(qk_layernorm=True),
        vocab_size=VOCABULARY,
        max_sequence_length=LENGTH,
        position_embedding_type="rope",
        rotary_base=10_000,
    )


def _optimizer_and_ddp(model: Any) -> tuple[Any, Any]:
    """As the recipes train: distributed optimizer, all overlaps, gradients averaged in the collective."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=True,
        overlap_param_gather=True,
        average_in_collective=True,
        use_distributed_optimizer=True,
    )
    ddp = DistributedDataParallel(model.config, ddp_config, model)
    optimizer_config = OptimizerConfig(
        optimizer="adam",
        lr=LEARNING_RATE,
        weight_decay=0.0,
        adam_beta2=0.999,
        adam_eps=ADAM_EPS,
        clip_grad=MAX_NORM,
        use_distributed_optimizer=True,
        params_dtype=torch.float32,
    )
    return ddp, get_megatron_optimizer(optimizer_config, [ddp])


def _train_as_hf(layout: dict[str, Any]) -> dict[str, float]:
    """Train from the same weights on the same batch as `_train_hf`; returns the largest differences."""
    from prune_distill.nemo import backend

    chosen = backend.activate()
    import torch.distributed as dist
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.utils import get_batch_on_this_cp_rank

    sizes = {name: size for name, size in layout.items() if name.endswith("parallel_size")}
    parallel_state.initialize_model_parallel(**sizes)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    tp_rank, tp_size = parallel_state.get_tensor_model_parallel_rank(), layout.get("tensor_model_parallel_size", 1)
    model = _megatron_model(chosen.model_config, layout)
    missing, unexpected = model.load_state_dict(_megatron_weights(_hf_model(), tp_rank, tp_size), strict=False)
    assert not unexpected
    assert all(name.endswith("_extra_state") for name in missing), missing
    ddp, optimizer = _optimizer_and_ddp(model)

    def own(batch_first: torch.Tensor) -> torch.Tensor:
        """This rank's rows (data parallel) and columns (context parallel) of `[b, s, ...]`."""
        rows = batch_first.chunk(parallel_state.get_data_parallel_world_size())[parallel_state.get_data_parallel_rank()]
        return get_batch_on_this_cp_rank({"tokens": rows})["tokens"]

    tokens = _batch()
    positions = torch.arange(LENGTH).expand(BATCH, -1)
    losses = []
    for _ in range(STEPS):
        ddp.zero_grad_buffer()
        optimizer.zero_grad()
        loss = ddp(own(tokens), own(positions), None, labels=own(tokens.roll(-1, 1))).mean()
        loss.backward()
        finalize_model_grads([ddp])
        optimizer.step()
        dist.all_reduce(mean := loss.detach().clone(), op=dist.ReduceOp.AVG)
        losses.append(mean.item())

    hf, hf_losses = _train_hf()
    model.eval()
    with torch.no_grad():
        logits = ddp(own(tokens), own(positions), None)
        hf_logits = own(hf(tokens).logits).chunk(tp_size, dim=-1)[tp_rank]
    return {
        "loss": max(abs(a - b) for a, b in zip(losses, hf_losses, strict=True)),
        "logits": (logits - hf_logits).abs().max().item(),
        "learned": losses[0] - losses[-1],
    }


LAYOUTS: dict[str, dict[str, Any]] = {
    "one_rank": {},
    "dp2": {},
    "tp2": {"tensor_model_parallel_size": 2},
    "tp2_sp": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "tp2_sp_recompute": {
        "tensor_model_parallel_size": 2,
        "sequence_parallel": True,
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
    "cp2": {"context_parallel_size": 2},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_follows_transformers(layout: str) -> None:
    """Same weights, batch, clipping (active: MAX_NORM is below the gradients' norm) and AdamW, so the same losses."""
    for differences in run_ranks(_train_as_hf, 1 if layout == "one_rank" else 2, LAYOUTS[layout]):
        assert differences["learned"] > 0.1
        # fp32 rounding of losses near 4.6 and logits of order 1, grown over four steps.
        assert differences["loss"] < 5e-6
        assert differences["logits"] < 5e-5


# --- the optimizer's state on disk ----------------------------------------------------------------------------------


def _checkpoint_round_trip(folder: str) -> None:
    from prune_distill.nemo import backend

    chosen = backend.activate()
    from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
    from megatron.core.distributed import finalize_model_grads

    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    tokens, positions = _batch(), torch.arange(LENGTH).expand(BATCH, -1)

    def build(seed: int) -> tuple[Any, Any]:
        torch.manual_seed(seed)
        return _optimizer_and_ddp(_megatron_model(chosen.model_config, {}))

    def step(ddp: Any, optimizer: Any) -> float:
        ddp.zero_grad_buffer()
        optimizer.zero_grad()
        loss = ddp(tokens, positions, None, labels=tokens.roll(-1, 1)).mean()
        loss.backward()
        finalize_model_grads([ddp])
        optimizer.step()
        return loss.item()

    def sharded(ddp: Any, optimizer: Any, loading: bool) -> dict[str, Any]:
        model_state = ddp.module.sharded_state_dict()
        # Megatron takes its parameters out of the mapping it is given.
        optimizer_state = optimizer.sharded_state_dict(copy.copy(model_state), is_loading=loading)
        return {"model": model_state, "optimizer": optimizer_state}

    trained = build(seed=1)
    for _ in range(2):
        step(*trained)
    dist_checkpointing.save(sharded(*trained, loading=False), folder)
    resumed = build(seed=2)
    state = dist_checkpointing.load(sharded(*resumed, loading=True), folder)
    resumed[0].module.load_state_dict(state["model"], strict=False)
    resumed[1].load_state_dict(state["optimizer"])
    assert [step(*resumed) for _ in range(3)] == [step(*trained) for _ in range(3)]


def test_a_resumed_optimizer_continues_exactly(tmp_path: Any) -> None:
    (tmp_path / "checkpoint").mkdir()
    run_ranks(_checkpoint_round_trip, 2, str(tmp_path / "checkpoint"))


# --- the helper itself ----------------------------------------------------------------------------------------------


def _fail_on_rank_1() -> None:
    import torch.distributed as dist

    if dist.get_rank() == 1:
        raise ValueError("rank 1 has had enough")
    dist.barrier()


def test_a_failing_rank_is_named_with_its_traceback() -> None:
    with pytest.raises(RankError, match="rank 1 failed(.|\n)*had enough"):
        run_ranks(_fail_on_rank_1, 2, timeout=60)
