"""Models and losses of distillation on tiny Megatron models, compared with plain implementations of the losses."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from prune_distill.errors import InputError
from prune_distill.nemo import backend

backend.activate()

from prune_distill.distillation import distillation  # noqa: E402
from prune_distill.distillation.distillation import (  # noqa: E402
    DistilledModel,
    FusedHead,
    LossReduction,
    StudentModel,
    TeacherSwap,
    student_to_train,
)
from prune_distill.nemo import nemo_api  # noqa: E402
from prune_distill.schema import (  # noqa: E402
    DistillConfig,
    Divergence,
    Fp8,
    HiddenLoss,
    KdConfig,
    LayerPair,
    Loss,
    LossImplementation,
    Precision,
    TeacherLogits,
)
from tests.helpers.one_rank import (  # noqa: E402
    SHAPE,
    TOKENIZER,
    VOCABULARY,
    config,
    core_model,
    nemo_model,
    one_rank,
    positions,
    save_weights,
)

# [b, s] = [2, 5], with a different mask for any other order of the tokens.
MASK = torch.tensor([[1.0, 1.0, 0.0, 1.0, 0.0], [0.0, 1.0, 0.0, 0.0, 0.0]])
KD = KdConfig(temperature=2.0, kd_weight=0.7, lm_weight=0.3, chunk_tokens=3)
CLOSE = {"rtol": 2e-5, "atol": 1e-6}
SMALL = dataclasses.replace(SHAPE, num_layers=2)


@pytest.fixture(scope="module", autouse=True)
def _one_rank() -> Iterator[None]:
    with one_rank():
        yield


def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    tokens, labels = (torch.randint(VOCABULARY, MASK.shape, generator=generator) for _ in range(2))
    return {"tokens": tokens, "labels": labels, "loss_mask": MASK, "position_ids": positions(tokens)}


def run(core: Any, given: dict[str, Tensor], labels: bool = True) -> Any:
    return core(given["tokens"], given["position_ids"], None, labels=given["labels"] if labels else None)


def plain(student: Tensor, teacher: Tensor, labels: Tensor, kd: KdConfig) -> tuple[Tensor, Tensor]:
    """Return temperature² x KL(teacher || student) and cross-entropy per token, `[b, s]`, of logits `[b, s, v]`."""
    p, log_q = (teacher / kd.temperature).softmax(-1), (student / kd.temperature).log_softmax(-1)
    divergence = kd.temperature**2 * (p * (p.log() - log_q)).sum(-1)
    return divergence, torch.nn.functional.cross_entropy(student.transpose(1, 2), labels, reduction="none")


def heads(kd: KdConfig = KD) -> tuple[Any, Any, FusedHead, Tensor, Tensor]:
    """Return a student and a teacher with fused heads, and their logits `[b, s, v]` without fused heads."""
    student, teacher = core_model(SMALL, seed=1), core_model(SHAPE, seed=2)
    logits = [run(core, batch(), labels=False) for core in (student, teacher)]
    head = FusedHead(student.train(), teacher, kd)
    head.batch = batch()
    return student, teacher, head, *logits


def test_the_fused_loss_is_the_masked_sum_and_its_parts_are_by_token() -> None:
    student, teacher, _, student_logits, teacher_logits = heads()
    with torch.no_grad():
        run(teacher, batch())
    total, kd_tokens, lm_tokens = run(student, batch())
    expected_kd, expected_lm = plain(student_logits, teacher_logits, batch()["labels"], KD)
    torch.testing.assert_close(kd_tokens, expected_kd, **CLOSE)
    torch.testing.assert_close(lm_tokens, expected_lm, **CLOSE)
    torch.testing.assert_close(total, ((0.7 * expected_kd + 0.3 * expected_lm) * MASK).sum(), **CLOSE)


def test_the_fused_loss_has_the_gradients_of_the_plain_one() -> None:
    student, teacher, _, _, teacher_logits = heads()
    reference = core_model(SMALL, seed=1).train()
    with torch.no_grad():
        run(teacher, batch())
    run(student, batch())[0].backward()
    kd, lm = plain(run(reference, batch(), labels=False), teacher_logits.detach(), batch()["labels"], KD)
    ((0.7 * kd + 0.3 * lm) * MASK).sum().backward()
    for (name, ours), theirs in zip(student.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-5, msg=name)
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_validation_uses_only_the_cross_entropy() -> None:
    student, _, _, student_logits, _ = heads()
    losses = run(student.eval(), batch())
    expected = torch.nn.functional.cross_entropy(student_logits.transpose(1, 2), batch()["labels"], reduction="none")
    torch.testing.assert_close(losses, expected, **CLOSE)


def test_teacher_hidden_states_are_used_for_one_step() -> None:
    student, teacher, head, *_ = heads()
    with torch.no_grad():
        run(teacher, batch())
    assert head.teacher_head is not None
    run(student, batch())
    assert head.teacher_head is None


def test_cached_logits_give_the_loss_of_the_live_teachers_top_k() -> None:
    live = dataclasses.replace(KD, top_k=4)
    student, teacher, _, student_logits, teacher_logits = heads(live)
    with torch.no_grad():
        run(teacher, batch())
    expected, kd_tokens, _ = run(student, batch())
    alone = core_model(SMALL, seed=1).train()
    head = FusedHead(alone, None, KD)
    log_probs, ids = (teacher_logits / KD.temperature).log_softmax(-1).topk(4, -1)
    tail = torch.log1p(-log_probs.exp().sum(-1))
    cached = {"cached_ids": ids.int(), "cached_logprobs": log_probs, "cached_tail": tail}
    head.batch = {**batch(), **cached}
    cached, cached_tokens, _ = run(alone, batch())
    torch.testing.assert_close(cached, expected, **CLOSE)
    torch.testing.assert_close(cached_tokens, kd_tokens, **CLOSE)
    # A single entry represents all other tokens.
    student_probs = (student_logits / KD.temperature).softmax(-1)
    kept = student_probs.gather(-1, ids)
    p, q = log_probs.exp(), kept
    rest_p, rest_q = 1 - p.sum(-1), 1 - q.sum(-1)
    by_hand = KD.temperature**2 * ((p * (p / q).log()).sum(-1) + rest_p * (rest_p / rest_q).log())
    torch.testing.assert_close(cached_tokens, by_hand, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_the_output_layers_own_weight_is_used(tied: bool) -> None:
    shape = dataclasses.replace(SMALL, tie_word_embeddings=tied)
    student = core_model(shape, seed=1)
    logits = run(student, batch(), labels=False)
    FusedHead(student, None, KdConfig(kd_weight=0.0, lm_weight=1.0))
    expected = torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch()["labels"], reduction="none")
    torch.testing.assert_close(run(student, batch()), expected, **CLOSE)


@pytest.mark.parametrize("change", [{"bias": torch.zeros(1)}, {"mtp": True}])
def test_output_layers_that_cannot_be_replaced_are_rejected(change: dict[str, Any]) -> None:
    student = core_model(SMALL)
    if "mtp" in change:
        student.mtp_process = True
    else:
        student.output_layer.bias = torch.nn.Parameter(change["bias"])
    with pytest.raises(NotImplementedError):
        FusedHead(student, None, KD)


def test_the_weights_of_a_loss_and_its_reported_parts() -> None:
    kd = KdConfig(kd_weight=0.5, lm_weight=2.0)
    kd_tokens, lm_tokens = torch.arange(10.0).view(2, 5), 10 * torch.ones(2, 5)
    reduction = LossReduction(kd, object(), fused=True)
    reduction.learned = 8.0
    # Learned are tokens 0, 1, 3 and 6: their KL is 10, their cross-entropy 40. The loss itself is summed already.
    total = torch.tensor(0.5 * 10 + 2.0 * 40)
    reduction.setup(batch())
    loss, sums = reduction((total, kd_tokens, lm_tokens))
    assert loss.item() == pytest.approx(85 / 8)
    assert sums["sums"].tolist() == pytest.approx([85, 10, 40, 0, 4])
    assert sums["sums"].dtype is torch.float64
    assert reduction.reduce([sums, sums]).item() == pytest.approx(85 / 4)
    assert reduction.parts.tolist() == pytest.approx([10 / 4, 40 / 4, 0])
    assert reduction.mean("x") == pytest.approx(85 / 4)


def student_and_teacher(
    kd: KdConfig, monkeypatch: pytest.MonkeyPatch, teacher_shape: Any = SHAPE
) -> tuple[DistilledModel, Any]:
    """Return a configured distillation and its teacher."""
    teacher = core_model(teacher_shape, seed=2)
    monkeypatch.setattr(distillation, "teacher_provider", lambda *_, **__: teacher)
    torch.manual_seed(1)
    teacher_config = config(teacher_shape)
    teacher_config.tensor_model_parallel_size = 4  # as a checkpoint may contain
    model = DistilledModel(config(SMALL), teacher_config, teacher_ckpt_path="x", tokenizer=TOKENIZER)
    model.kd = kd
    model._trainer = object()  # which only the loading of a teacher reads
    model.configure_model()
    return model, teacher


def hidden_states(core: Any, layer: int, given: dict[str, Tensor]) -> Tensor:
    """Return the output of layer `layer`, counted from 1: `[s, b, h]`."""
    found: list[Tensor] = []
    handle = core.decoder.layers[layer - 1].register_forward_hook(lambda _, __, output: found.append(output[0]))
    run(core, given, labels=False)
    handle.remove()
    return found[0]


@pytest.mark.parametrize("implementation", [LossImplementation.chunked, LossImplementation.upstream])
@pytest.mark.parametrize("hidden_loss", HiddenLoss)
def test_a_step_of_both_implementations_is_the_plain_loss(
    monkeypatch: pytest.MonkeyPatch, implementation: LossImplementation, hidden_loss: HiddenLoss
) -> None:
    pair = LayerPair(student=1, teacher=3)
    kd = dataclasses.replace(
        KD,
        implementation=implementation,
        intermediate_pairs=[pair],
        intermediate_weight=0.25,
        intermediate_loss=hidden_loss,
    )
    given = batch()
    references = core_model(SMALL, seed=1), core_model(SHAPE, seed=2)
    states = [hidden_states(core, layer, given) for core, layer in zip(references, (1, 3), strict=True)]
    logits = [run(core, given, labels=False) for core in references]
    model, _ = student_and_teacher(kd, monkeypatch)
    model.module.load_state_dict(references[0].state_dict(), strict=False)
    assert model._teacher_config.tensor_model_parallel_size == 1
    model.train()
    reduction = model.training_loss_reduction
    assert isinstance(reduction, LossReduction)
    reduction.setup(given)
    loss, sums = reduction(model.forward_step(given))
    kd_tokens, lm_tokens = plain(*logits, given["labels"], kd)
    # Equal hidden sizes, so that there is no projection.
    first, second = states
    if hidden_loss is HiddenLoss.cosine:
        hidden = 1 - torch.nn.functional.cosine_similarity(first, second, dim=-1)
    else:
        hidden = ((first - second) ** 2).mean(-1)
    hidden = hidden.t()
    expected = [(part * MASK).sum() for part in (kd_tokens, lm_tokens)]
    whole = 0.7 * expected[0] + 0.3 * expected[1]
    found = sums["sums"]
    assert found[4] == 4
    torch.testing.assert_close(found[1].float(), expected[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[2].float(), expected[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[3].float(), (hidden * MASK).sum(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[0].float(), whole + 0.25 * (hidden * MASK).sum(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(loss, found[0].float(), rtol=1e-4, atol=1e-5)


def test_pairs_are_averaged_and_parts_without_weight_are_not_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = [LayerPair(student=1, teacher=2), LayerPair(student=2, teacher=4)]
    kd = KdConfig(intermediate_pairs=pairs, intermediate_loss=HiddenLoss.mse)
    given = batch()
    references = core_model(SMALL, seed=1), core_model(SHAPE, seed=2)
    model, _ = student_and_teacher(kd, monkeypatch)
    model.module.load_state_dict(references[0].state_dict(), strict=False)
    model.train()
    reduction = model.training_loss_reduction
    reduction.setup(given)
    _, sums = reduction(model.forward_step(given))
    distances = []
    for pair in pairs:
        first, second = (
            hidden_states(core, layer, given)
            for core, layer in zip(references, (pair.student, pair.teacher), strict=True)
        )
        distances.append((((first - second) ** 2).mean(-1).t() * MASK).sum())
    torch.testing.assert_close(sums["sums"][3].float(), sum(distances) / 2, rtol=1e-4, atol=1e-5)
    reduction.reduce([sums])
    assert set(model.loss_parts()) == {"kd_loss", "hidden_loss"}
    assert model.loss_parts()["hidden_loss"] == pytest.approx(float(sums["sums"][3]) / 4, rel=1e-5)


def test_a_students_projections_are_not_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    narrow = dataclasses.replace(SHAPE, hidden_size=32)
    kd = KdConfig(intermediate_pairs=[LayerPair(student=1, teacher=1)])
    model, _ = student_and_teacher(kd, monkeypatch, narrow)
    named = lambda: [name for name, _ in model.module.named_parameters() if "_loss_modules" in name]  # noqa: E731
    assert named()
    with model.student_only():
        assert not named()
    assert named()


def test_the_teacher_runs_in_the_students_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    model, teacher = student_and_teacher(KD, monkeypatch)
    assert model._teacher_config.tensor_model_parallel_size == model.config.tensor_model_parallel_size == 1
    assert model.head is not None
    assert model.head.teacher_head is None
    model.train()
    given = batch()
    model.forward_step(given)
    assert model.head.batch is given
    assert model.module.teacher_model is teacher


def test_reverse_kl_of_upstreams_implementation(monkeypatch: pytest.MonkeyPatch) -> None:
    kd = KdConfig(Divergence.reverse_kl, temperature=1.5, implementation=LossImplementation.upstream)
    given = batch()
    references = core_model(SMALL, seed=1), core_model(SHAPE, seed=2)
    log_q, log_p = ((run(core, given, labels=False) / 1.5).log_softmax(-1) for core in references)
    model, _ = student_and_teacher(kd, monkeypatch)
    model.module.load_state_dict(references[0].state_dict(), strict=False)
    model.train()
    reduction = model.training_loss_reduction
    reduction.setup(given)
    loss, _ = reduction(model.forward_step(given))
    expected = 1.5**2 * ((log_q.exp() * (log_q - log_p)).sum(-1) * MASK).sum()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)


def test_a_layers_name_is_counted_from_one() -> None:
    assert distillation._layer_name(3, config()) == "decoder.layers.2"


# Checkpoints whose tokenizers were compared.
COMPARED: list[tuple[Path, ...]] = []


def models(monkeypatch: pytest.MonkeyPatch, **teacher: Any) -> tuple[Path, Path]:
    """Return a student's and a teacher's checkpoint, for which `load_model` is patched."""
    student, other = Path("student"), Path("teacher")
    made = {student: nemo_model(SMALL), other: nemo_model(dataclasses.replace(SHAPE, **teacher))}
    monkeypatch.setattr(nemo_api, "load_model", made.__getitem__)
    monkeypatch.setattr(distillation, "check_tokenizers", lambda *pair: COMPARED.append(pair))
    return student, other


def test_a_student_is_trained_with_its_teacher_on_cached_logits_or_on_the_data(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = models(monkeypatch)
    kd = dataclasses.replace(KD, chunk_tokens=7)
    distill = DistillConfig(max_steps=1, kd=kd, precision=Precision.fp32)
    COMPARED.clear()
    live = student_to_train(distill, student, teacher)
    assert [(student / "context" / "tokenizer", teacher / "context" / "tokenizer")] == COMPARED
    assert isinstance(live, DistilledModel)
    assert live.kd is kd
    assert live._teacher_ckpt_path == "teacher"
    assert live._teacher_config.num_layers == 4
    stored = student_to_train(dataclasses.replace(distill, teacher_logits=TeacherLogits.cached), student, None)
    assert isinstance(stored, StudentModel)
    assert stored.kd is kd
    alone = student_to_train(dataclasses.replace(distill, loss=Loss.ce), student, None)
    assert (alone.kd.kd_weight, alone.kd.lm_weight, alone.kd.chunk_tokens) == (0.0, 1.0, 7)
    for model in (live, stored, alone):
        assert model.config.num_layers == 2
        assert model.__io__ is nemo_api.load_model(student).__io__


@pytest.mark.parametrize(
    ("implementation", "ids", "supported"),
    [
        ("chunked", 64, True),
        ("chunked", 40, True),
        ("triton", 64, True),
        ("triton", 40, False),
        ("upstream", 64, False),
    ],
)
def test_a_teacher_of_another_vocabulary_needs_an_implementation_that_compares_it(
    monkeypatch: pytest.MonkeyPatch, implementation: str, ids: int, supported: bool
) -> None:
    monkeypatch.setattr(distillation, "check_implementation", lambda *given: None)
    student, teacher = models(monkeypatch, vocab_size=ids)
    distill = DistillConfig(max_steps=1, kd=KdConfig(implementation=LossImplementation[implementation]))
    if supported:
        assert student_to_train(distill, student, teacher)._teacher_config.vocab_size == ids
        return
    with pytest.raises(InputError, match=f"vocabulary of 48 ids with the teacher's of {ids}; set .*=chunked"):
        student_to_train(distill, student, teacher)


@pytest.mark.parametrize("ids", [64, 40])
def test_the_fused_loss_of_vocabularies_of_different_size(ids: int) -> None:
    """The teacher is wider and deeper as well, and its output weight is taken again after a swap."""
    shape = dataclasses.replace(SHAPE, vocab_size=ids, hidden_size=96, num_attention_heads=6)
    shared = min(ids, VOCABULARY)
    given = batch()
    given = {**given, "tokens": given["tokens"] % shared, "labels": given["labels"] % shared}
    student, teacher = core_model(SMALL, seed=1), core_model(shape, seed=2)
    for _ in range(2):
        student_logits, teacher_logits = (run(core, given, labels=False).double() for core in (student, teacher))
        head = FusedHead(student.train(), teacher, KD)
        head.batch = given
        with torch.no_grad():
            run(teacher, given)
        _, kd_tokens, _ = run(student, given)
        p = (teacher_logits[..., :shared] / KD.temperature).softmax(-1)
        log_q = (student_logits / KD.temperature).log_softmax(-1)[..., :shared]
        expected = KD.temperature**2 * (p * (p.log() - log_q)).sum(-1)
        torch.testing.assert_close(kd_tokens.double(), expected, **CLOSE)
        for core in (student, teacher):
            core.output_layer.__dict__.pop("forward")
            del core.compute_language_model_loss
        with torch.no_grad():
            teacher.output_layer.weight *= 1.5


def test_the_teacher_gets_the_types_of_the_trainings_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = models(monkeypatch)
    model = student_to_train(DistillConfig(max_steps=1, precision=Precision.bf16), student, teacher)
    assert model._teacher_config.bf16
    assert model._teacher_config.params_dtype is torch.bfloat16


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"fp8": Fp8.hybrid}, (None, "delayed")),
        ({"teacher_fp8": True}, ("hybrid", "tensorwise")),
        ({"fp8": Fp8.hybrid, "teacher_fp8": True}, ("hybrid", "tensorwise")),
        ({"fp8": Fp8.blockwise, "teacher_fp8": True}, ("e4m3", "blockwise")),
    ],
)
def test_fp8_of_the_teacher_is_its_own(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], expected: tuple[str | None, str]
) -> None:
    student, teacher = models(monkeypatch)
    distill = DistillConfig(max_steps=1, precision=Precision.bf16, **settings)
    model = student_to_train(distill, student, teacher)
    assert (model._teacher_config.fp8, model._teacher_config.fp8_recipe) == expected
    assert model.config.fp8 is None  # the precision plugin sets it


def test_the_teacher_is_replaced_once_before_its_step(monkeypatch: pytest.MonkeyPatch) -> None:
    replaced: list[Any] = []
    monkeypatch.setattr(nemo_api, "load_parameters", lambda *given: replaced.append(given))
    swap = TeacherSwap(Path("corrected"), step=2)
    teacher = object()
    head = SimpleNamespace(teacher_rows=object())
    module = SimpleNamespace(module=SimpleNamespace(teacher_model=teacher), head=head)
    counts = []
    for step in range(4):
        trainer = SimpleNamespace(global_step=step)
        swap.on_train_batch_start(trainer, module, None, 0)
        counts.append(len(replaced))
    assert counts == [0, 0, 1, 1]
    assert head.teacher_rows is None
    assert replaced[0][:2] == (teacher, Path("corrected"))
    resumed = TeacherSwap(Path("corrected"), step=2)
    resumed.on_train_batch_start(SimpleNamespace(global_step=5), module, None, 0)
    assert len(replaced) == 2


def test_a_replaced_teacher_has_the_weights_of_the_checkpoint(tmp_path: Path) -> None:
    from megatron.core.dist_checkpointing.validation import StrictHandling
    from nemo.lightning.io.pl import MegatronCheckpointIO

    corrected, teacher = core_model(SHAPE, seed=5), core_model(SHAPE, seed=6)
    checkpoint = save_weights(corrected, tmp_path / "corrected")
    files = MegatronCheckpointIO()
    strategy = SimpleNamespace(
        unwrapped_checkpoint_io=files, checkpoint_io=files, ckpt_load_strictness=StrictHandling.LOG_ALL
    )
    nemo_api.load_parameters(teacher, checkpoint, SimpleNamespace(strategy=strategy))
    for (name, ours), theirs in zip(teacher.named_parameters(), corrected.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    # FP8 copies of the weights of before are not used any more.
    settings = {"fp8": "hybrid", "fp8_recipe": "tensorwise"}
    corrected, teacher = core_model(SHAPE, seed=5, **settings), core_model(SHAPE, seed=6, **settings)
    ids = torch.zeros(1, 16, dtype=torch.int64)
    with torch.no_grad():
        teacher(ids, positions(ids), None)
        nemo_api.load_parameters(teacher, checkpoint, SimpleNamespace(strategy=strategy))
        assert torch.equal(*(model(ids, positions(ids), None) for model in (teacher, corrected)))
    tied = save_weights(core_model(dataclasses.replace(SHAPE, tie_word_embeddings=True)), tmp_path / "tied")
    with pytest.raises(InputError, match="lacks 1 parameters of .*output_layer.weight"):
        nemo_api.load_parameters(teacher, tied, SimpleNamespace(strategy=strategy))
