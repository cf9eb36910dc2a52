"""Setup, checks and summary of a training, with NeMo's objects."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from prune_distill.errors import ConfigError, InputError
from prune_distill.nemo import backend

backend.activate()

from prune_distill.nemo import nemo_api  # noqa: E402
from prune_distill.nemo.precision import model_precision, precision_plugin  # noqa: E402
from prune_distill.schema import Parallel, Phase, Precision, Recompute, Schedule, Training  # noqa: E402
from prune_distill.schema.schedules import learning_rate  # noqa: E402
from prune_distill.training import training  # noqa: E402
from prune_distill.training.optimizer import LearningRates, _no_decay, connect_optimizer  # noqa: E402
from tests.helpers.one_rank import SHAPE, config, nemo_model, one_rank, write_data  # noqa: E402

CFG = Training(
    max_steps=10,
    seq_length=8,
    global_batch_size=4,
    micro_batch_size=2,
    lr=0.5,
    min_lr=0.125,
    warmup_steps=2,
    schedule=Schedule.linear,
    weight_decay=0.25,
    adam_beta1=0.8,
    adam_beta2=0.9,
    clip_grad=0.75,
    precision=Precision.fp32,
)


@pytest.fixture(scope="module", autouse=True)
def _one_rank() -> Iterator[None]:
    with one_rank():
        yield


@pytest.mark.parametrize("precision", Precision)
def test_the_optimizer_has_the_trainings_settings(precision: Precision) -> None:
    model = nemo_model()
    connect_optimizer(model, dataclasses.replace(CFG, precision=precision, use_distributed_optimizer=False))
    found = model.optim.config
    assert found.optimizer == "adam"
    assert (found.adam_beta1, found.adam_beta2) == (0.8, 0.9)
    assert (found.lr, found.min_lr, found.weight_decay, found.clip_grad) == (0.5, 0.125, 0.25, 0.75)
    assert found.bf16 is (precision is Precision.bf16)
    assert found.params_dtype is (torch.bfloat16 if precision is Precision.bf16 else torch.float32)
    assert found.use_distributed_optimizer is False
    assert isinstance(model.optim.lr_scheduler, LearningRates)


def test_adam_uses_the_settings() -> None:
    """Two steps of a real optimizer, compared with a plain AdamW."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import get_megatron_optimizer
    from megatron.core.transformer import TransformerConfig

    class Product(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.tensor([[1.0, -2.0], [0.5, 3.0]]))

    model = nemo_model()
    connect_optimizer(model, dataclasses.replace(CFG, use_distributed_optimizer=False, clip_grad=1e9))
    module = Product()
    settings = TransformerConfig(num_layers=1, hidden_size=2, num_attention_heads=1, use_cpu_initialization=True)
    wrapped = DistributedDataParallel(settings, DistributedDataParallelConfig(), module)
    optimizer = get_megatron_optimizer(model.optim.config, [wrapped])
    weight = module.weight.detach().double().clone()
    first, second = torch.zeros(2, 2).double(), torch.zeros(2, 2).double()
    for step, gradient in enumerate(
        (torch.tensor([[1.0, 2.0], [-3.0, 0.5]]), torch.tensor([[0.1, -1], [2.0, 4.0]])), 1
    ):
        module.weight.main_grad.copy_(gradient)
        optimizer.step()
        first = 0.8 * first + 0.2 * gradient
        second = 0.9 * second + 0.1 * gradient**2
        update = (first / (1 - 0.8**step)) / ((second / (1 - 0.9**step)).sqrt() + 1e-8)
        weight = weight - 0.5 * (update + 0.25 * weight)
        torch.testing.assert_close(module.weight.double(), weight, rtol=1e-4, atol=1e-5)


def test_rates_change_after_every_step() -> None:
    parameter = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([parameter], lr=CFG.lr)
    made = LearningRates(CFG).scheduler(None, optimizer)
    assert made["optimizer"] is optimizer
    assert (made["lr_scheduler"]["interval"], made["lr_scheduler"]["frequency"]) == ("step", 1)
    found = []
    for _ in range(CFG.max_steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        made["lr_scheduler"]["scheduler"].step()
    assert found == pytest.approx([learning_rate(CFG, step) for step in range(CFG.max_steps)])
    # A third, two thirds, then from 1/2 in a line to 1/8 after 8 steps.
    assert found[:4] == pytest.approx([0.5 / 3, 1 / 3, 0.5, 0.5 - 0.375 / 8])


@pytest.mark.parametrize("decay", [True, False])
def test_norms_biases_and_embeddings_without_weight_decay(decay: bool) -> None:
    model = nemo_model()
    connect_optimizer(model, dataclasses.replace(CFG, decay_embeddings=decay))
    assert (model.optim.no_weight_decay_cond is _no_decay) is not decay
    matrix, vector, copied = torch.ones(2, 2), torch.ones(2), torch.ones(2, 2)
    copied.shared_embedding = True  # type: ignore[attr-defined]
    assert not _no_decay("decoder.layers.0.mlp.linear_fc1.weight", matrix)
    assert _no_decay("decoder.layers.0.mlp.linear_fc1.bias", matrix)
    assert _no_decay("decoder.final_layernorm.weight", vector)
    assert _no_decay("embedding.word_embeddings.weight", matrix)
    assert _no_decay("output_layer.weight", copied)


@pytest.fixture
def data(tmp_path: Path) -> Any:
    return write_data(tmp_path, {"a": [[1] * 8 + [0]], "b": [[2] * 40]}, [[3] * 32 + [0]])


def test_data_and_ranks_that_fit_pass(data: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    training.check(CFG, data)
    monkeypatch.setattr(training, "world_size", lambda: 2)
    training.check(CFG, data)
    training.check(dataclasses.replace(CFG, parallel=Parallel(2)), data)


@pytest.mark.parametrize(
    ("ranks", "parallel", "fault"),
    [
        (2, Parallel(1, 4), "2 ranks .* 4"),
        (6, Parallel(2, 2), "6 ranks .* 4"),
        (6, Parallel(1, 1, 4), "6 ranks .* 4"),
        (4, Parallel(1), "global_batch_size=4: .* 8"),
        (3, Parallel(1), "global_batch_size=4: .* 6"),
    ],
)
def test_ranks_that_do_not_fit_are_rejected(
    data: Any, monkeypatch: pytest.MonkeyPatch, ranks: int, parallel: Parallel, fault: str
) -> None:
    monkeypatch.setattr(training, "world_size", lambda: ranks)
    with pytest.raises(ConfigError, match=fault):
        training.check(dataclasses.replace(CFG, parallel=parallel), data)


def test_the_batch_of_a_phase_must_fit(data: Any) -> None:
    phases = [Phase(max_steps=5), Phase(max_steps=5, global_batch_size=3)]
    with pytest.raises(ConfigError, match="global_batch_size=3: .* 2"):
        training.check(dataclasses.replace(CFG, phases=phases), data)


def test_too_few_documents_are_rejected(data: Any) -> None:
    # 49 training tokens and 33 held-out ones: a sequence has a token more than it is long.
    training.check(dataclasses.replace(CFG, seq_length=32, val_batches=1), data)
    with pytest.raises(InputError, match="validation .* 33 tokens, 0 sequences of 33"):
        training.check(dataclasses.replace(CFG, seq_length=33), data)
    with pytest.raises(InputError, match="train .* 49 tokens, 0 sequences of 49"):
        training.check(dataclasses.replace(CFG, seq_length=49), data)
    only_a = [Phase(max_steps=10, weights={"a": 1.0})]
    training.check(dataclasses.replace(CFG, phases=only_a), data)
    with pytest.raises(InputError, match="train .* 9 tokens, 0 sequences of 16"):
        training.check(dataclasses.replace(CFG, seq_length=16, phases=only_a), data)
    # The whole set must fill a global batch.
    training.check(dataclasses.replace(CFG, val_batches=None), data)
    with pytest.raises(InputError, match="validation .* 2 sequences of 16, but 4 are needed"):
        training.check(dataclasses.replace(CFG, seq_length=16, val_batches=None), data)


@pytest.mark.parametrize(
    ("recompute", "expected"),
    [
        (Recompute.none, (None, None, None)),
        (Recompute.selective, ("selective", None, None)),
        (Recompute.full, ("full", "uniform", 1)),
    ],
)
def test_recomputation_settings(recompute: Recompute, expected: tuple[Any, ...]) -> None:
    made = config()
    training._configure(made, dataclasses.replace(CFG, recompute=recompute))
    assert (made.recompute_granularity, made.recompute_method, made.recompute_num_layers) == expected
    assert made.seq_length == 8


def test_the_router_loss_is_per_sequence() -> None:
    made = SimpleNamespace(num_moe_experts=4, moe_aux_loss_coeff=0.25, moe_router_load_balancing_type="aux_loss")
    training._configure(made, dataclasses.replace(CFG, parallel=Parallel(context_parallel_size=2)))
    assert (made.moe_aux_loss_coeff, made.moe_router_load_balancing_type) == (0.5, "seq_aux_loss")
    other = SimpleNamespace(num_moe_experts=4, moe_aux_loss_coeff=0.25, moe_router_load_balancing_type="none")
    training._configure(other, CFG)
    assert (other.moe_aux_loss_coeff, other.moe_router_load_balancing_type) == (0.25, "none")


@pytest.mark.parametrize(("val_batches", "limit"), [(None, 1.0), (3, 3)])
def test_the_trainer_uses_the_settings_for_validation_and_logging(val_batches: int | None, limit: float) -> None:
    cfg = dataclasses.replace(CFG, val_batches=val_batches, val_every_n_steps=4, async_save=False)
    trainer = training._trainer(cfg, [])
    assert (trainer.max_steps, trainer.val_check_interval, trainer.limit_val_batches) == (10, 4, limit)
    ddp = trainer.strategy.ddp_config
    assert ddp.check_for_nan_in_grad
    assert ddp.grad_reduce_in_fp32
    assert ddp.average_in_collective
    assert (ddp.overlap_grad_reduce, ddp.overlap_param_gather) == (True, True)
    long = training._trainer(dataclasses.replace(cfg, val_every_n_steps=400), [])
    assert long.val_check_interval == 10


def test_the_layout_of_a_trainer() -> None:
    parallel = Parallel(2, 1, 1, sequence_parallel=True)
    strategy = nemo_api.make_trainer(parallel, Precision.fp32, "pytorch").strategy
    assert strategy.tensor_model_parallel_size == 2
    assert strategy.sequence_parallel
    assert strategy.expert_tensor_parallel_size == 1
    alone = nemo_api.make_trainer(Parallel(sequence_parallel=True), Precision.fp32, "pytorch").strategy
    assert not alone.sequence_parallel


def test_the_summary_has_the_last_and_the_best_loss(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [
        {"step": 1, "loss": 4.0},
        {"step": 2, "val_loss": 2.5},
        {"step": 3, "loss": 3.0},
        {"step": 4, "val_loss": 2.75},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    cfg = dataclasses.replace(CFG, skip_steps=[[4, 5], [2, 2]])
    assert training._summary(cfg, path) == {
        "backend": "cpu",
        "steps": 10,
        "tokens": 10 * 4 * 8,
        "skipped_steps": [2, 4, 5],
        "train_loss": 3.0,
        "val_loss": 2.75,
        "best_val_loss": 2.5,
    }
    empty = training._summary(CFG, tmp_path / "none")
    assert (empty["train_loss"], empty["val_loss"], empty["best_val_loss"]) == (None, None, None)


def test_non_finite_gradients_are_an_input_error() -> None:
    message = InputError("documents")

    def fit(fault: str) -> Any:
        def raises(*_: Any, ckpt_path: str | None) -> None:
            raise RuntimeError(f"{fault} {ckpt_path}")

        return SimpleNamespace(fit=raises, global_step=6)

    guard = SimpleNamespace(error=lambda step, fault: message if step == 6 else None)
    with pytest.raises(InputError, match="documents"):
        training._fit(fit("found NaN in local grad norm for bucket"), None, None, None, guard)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="other None"):
        training._fit(fit("other"), None, None, None, guard)  # type: ignore[arg-type]


@pytest.mark.parametrize(("layers", "stages", "last"), [(8, 2, None), (7, 2, 3), (5, 4, 2), (9, 4, 0), (3, 2, 1)])
def test_the_last_pipeline_stage_gets_the_remaining_layers(layers: int, stages: int, last: int | None) -> None:
    found = nemo_api._layers_in_last_stage(layers, stages)
    if last is None:
        assert found is None
        return
    assert found is not None
    others, rest = divmod(layers - found, stages - 1)
    assert rest == 0
    assert others > 0
    assert found > 0
    if last:
        assert found == last


def test_a_models_settings_on_this_backend() -> None:
    made = config()
    assert made.apply_rope_fusion is (not made.rotary_interleaved)
    assert made.bias_activation_fusion  # SwiGLU
    made.gated_linear_unit = False
    nemo_api.configure(made)
    assert not made.bias_activation_fusion
    made.rotary_interleaved = True
    nemo_api.configure(made)
    assert not made.apply_rope_fusion
    assert made.use_cpu_initialization


def test_precisions() -> None:
    assert model_precision(SimpleNamespace(params_dtype=torch.bfloat16)) is Precision.bf16
    assert model_precision(SimpleNamespace(params_dtype=torch.float32)) is Precision.fp32
    for precision, dtype in ((Precision.bf16, torch.bfloat16), (Precision.fp32, torch.float32)):
        plugin = precision_plugin(precision)
        assert plugin.dtype_config.params_dtype is dtype
        assert plugin.dtype_config.pipeline_dtype is dtype
        assert plugin.dtype_config.grad_reduce_in_fp32
        assert plugin.dtype_config.bf16 is (precision is Precision.bf16)
    assert SHAPE.num_layers == 4
