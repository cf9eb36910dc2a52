"""The chunked loss compared with a plain float64 implementation and its gradient by autograd."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from prune_distill.distillation.kd_loss import distillation_loss
from prune_distill.distillation.loss_chunk import Head, slice_rows
from prune_distill.distillation.loss_terms import TopK, Vocabulary, select_top_k
from prune_distill.schema import Divergence, KdConfig
from tests.helpers.ranks import run_ranks

# 37 tokens in chunks of 8: the last one is shorter. 61 entries: an odd vocabulary.
TOKENS, STUDENT, TEACHER, VOCABULARY = 37, 12, 20, 61
# Of the largest entry. A float32 logit of size 10 is off by up to 5e-7, which its exponential then is in proportion,
# and reverse KL and Jensen-Shannon multiply it by a logarithm.
CLOSE = 3e-6
SPECS = [
    *(KdConfig(divergence, temperature) for divergence, temperature in itertools.product(Divergence, (1.0, 2.5))),
    KdConfig(lm_weight=0.3),
    KdConfig(temperature=2.0, kd_weight=0.7, lm_weight=0.3),
    KdConfig(Divergence.jensen_shannon, temperature=2.0, kd_weight=0.7, lm_weight=0.3),
    KdConfig(kd_weight=0.0, lm_weight=1.0),
    KdConfig(top_k=7),
    KdConfig(top_k=7, temperature=1.5, lm_weight=0.2),
    KdConfig(top_k=VOCABULARY - 1),
]


def ids(spec: KdConfig) -> str:
    return "-".join(str(getattr(value, "value", value)) for value in dataclasses.astuple(spec)[:5])


def tensors(seed: int = 0, vocabulary: int = VOCABULARY, teacher: int | None = None) -> dict[str, Tensor]:
    """Inputs of the loss; `teacher`: the size of its vocabulary, the student's if None."""
    generator = torch.Generator().manual_seed(seed)
    random = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    mask = torch.ones(TOKENS)
    mask[5:11] = 0
    mask[20] = 0.5
    return {
        "hidden": random(TOKENS, STUDENT),
        "weight": random(vocabulary, STUDENT),
        "teacher_hidden": random(TOKENS, TEACHER),
        "teacher_weight": random(teacher or vocabulary, TEACHER) * 0.7,
        "labels": torch.randint(min(vocabulary, teacher or vocabulary), (TOKENS,), generator=generator),
        "mask": mask,
    }


def plain(given: dict[str, Tensor], spec: KdConfig) -> tuple[Tensor, Tensor, Tensor]:
    """The summed loss and its gradients by hidden states and weight, in float64.

    Both distributions are renormalized over the ids that both models have, and the student pays for its others.
    """
    shared = min(len(given["weight"]), len(given["teacher_weight"]))
    hidden, weight = (given[name].double().requires_grad_() for name in ("hidden", "weight"))
    logits = hidden @ weight.t()
    teacher = (given["teacher_hidden"].double() @ given["teacher_weight"][:shared].double().t()) / spec.temperature
    log_q, log_p = torch.log_softmax(logits / spec.temperature, -1)[:, :shared], torch.log_softmax(teacher, -1)
    log_mass = log_q.logsumexp(-1)  # 0 if all ids are shared
    log_q = log_q - log_mass[:, None]
    if spec.top_k is not None:
        chosen = log_p.topk(spec.top_k, -1).indices
        log_q, log_p = _in_part(log_q, chosen), _in_part(log_p, chosen)
    log_m = torch.logaddexp(log_q, log_p) - torch.log(torch.tensor(2.0, dtype=torch.float64))
    divergence = {
        Divergence.forward_kl: (log_p.exp() * (log_p - log_q)).sum(-1),
        Divergence.reverse_kl: (log_q.exp() * (log_q - log_p)).sum(-1),
        Divergence.jensen_shannon: (log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m)).sum(-1) / 2,
    }[spec.divergence] - log_mass
    lm = torch.nn.functional.cross_entropy(logits, given["labels"], reduction="none")
    loss = spec.kd_weight * spec.temperature**2 * divergence + spec.lm_weight * lm
    total = (loss * given["mask"].double()).sum()
    total.backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return total.detach(), hidden.grad, weight.grad


def _in_part(log_probs: Tensor, chosen: Tensor) -> Tensor:
    """Return the log-probabilities of selected tokens, and that of all others together."""
    rest = log_probs.scatter(-1, chosen, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([log_probs.gather(-1, chosen), rest], -1)


def chunked(
    given: dict[str, Tensor], spec: KdConfig, teacher: Any = None, shared: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight = (given[name].clone().requires_grad_() for name in ("hidden", "weight"))
    teacher = teacher or Head(given["teacher_hidden"], given["teacher_weight"])
    total, _ = distillation_loss(Head(hidden, weight), teacher, given["labels"], given["mask"], spec, None, shared)
    (total / 3).backward()  # the incoming gradient is not 1
    assert hidden.grad is not None
    assert weight.grad is not None
    return total.detach(), hidden.grad * 3, weight.grad * 3


def assert_close(ours: tuple[Tensor, ...], reference: tuple[Tensor, ...], atol: float = CLOSE) -> None:
    for mine, theirs in zip(ours, reference, strict=True):
        scale = theirs.abs().max()
        torch.testing.assert_close(mine.double() / scale, theirs / scale, rtol=0, atol=atol)


@pytest.mark.parametrize("spec", SPECS, ids=ids)
def test_loss_and_gradients_match_the_plain_implementation(spec: KdConfig) -> None:
    given = tensors()
    assert_close(chunked(given, dataclasses.replace(spec, chunk_tokens=8)), plain(given, spec))


@pytest.mark.parametrize("chunk", [1, 36, 37, 1000])
def test_the_chunk_size_does_not_change_the_loss(chunk: int) -> None:
    given, spec = tensors(), KdConfig(lm_weight=0.5)
    assert_close(chunked(given, dataclasses.replace(spec, chunk_tokens=chunk)), plain(given, spec))


def test_large_logits_do_not_overflow() -> None:
    given = tensors()
    given = {**given, "hidden": given["hidden"] * 100, "teacher_hidden": given["teacher_hidden"] * 100}
    for spec in SPECS:
        total, *gradients = chunked(given, spec)
        assert torch.isfinite(total)
        assert all(torch.isfinite(gradient).all() for gradient in gradients)


def test_token_losses_are_not_masked_and_have_no_gradient() -> None:
    given, spec = tensors(), KdConfig(temperature=2.0, lm_weight=0.5, chunk_tokens=8)
    student = Head(given["hidden"].requires_grad_(), given["weight"].requires_grad_())
    teacher = Head(given["teacher_hidden"], given["teacher_weight"])
    total, tokens = distillation_loss(student, teacher, given["labels"], given["mask"], spec)
    assert not tokens.kd.requires_grad
    assert not tokens.lm.requires_grad
    assert (tokens.kd > 0).all()
    torch.testing.assert_close(((tokens.kd + 0.5 * tokens.lm) * given["mask"]).sum(), total.detach())


def test_without_gradients_the_losses_are_the_same() -> None:
    given, spec = tensors(), KdConfig(lm_weight=0.5, chunk_tokens=8)
    heads = Head(given["hidden"], given["weight"]), Head(given["teacher_hidden"], given["teacher_weight"])
    with torch.no_grad():
        total, _ = distillation_loss(*heads, given["labels"], given["mask"], spec)
    assert not total.requires_grad
    torch.testing.assert_close(total.double(), plain(given, spec)[0], rtol=1e-6, atol=0)


def test_cached_logits_match_the_live_teacher() -> None:
    given = tensors()
    spec = KdConfig(top_k=9, temperature=1.5, lm_weight=0.25, chunk_tokens=8)
    logits = given["teacher_hidden"] @ given["teacher_weight"].t() / spec.temperature
    stored = select_top_k(logits - logits.amax(-1, keepdim=True), 9, Vocabulary(VOCABULARY))
    assert_close(chunked(given, dataclasses.replace(spec, top_k=None), stored), plain(given, spec))


def test_top_k_and_tail_are_the_whole_distribution() -> None:
    logits = torch.randn(4, VOCABULARY)
    log_probs = torch.log_softmax(logits, -1)
    kept = select_top_k(logits - logits.amax(-1, keepdim=True), 5, Vocabulary(VOCABULARY))
    torch.testing.assert_close(kept.log_probs, log_probs.gather(-1, kept.ids))
    assert torch.equal(kept.ids, log_probs.topk(5, -1).indices)
    torch.testing.assert_close(kept.log_probs.exp().sum(-1) + kept.tail.exp(), torch.ones(4))


def test_a_teacher_without_tail_gives_a_finite_loss() -> None:
    given = tensors()
    teacher = TopK(
        torch.arange(3).repeat(TOKENS, 1), torch.full((TOKENS, 3), 1 / 3).log(), torch.full((TOKENS,), -torch.inf)
    )
    total, *gradients = chunked(given, KdConfig(), teacher)
    logits = given["hidden"] @ given["weight"].t()
    expected = (-torch.log_softmax(logits, -1)[:, :3].mean(-1) + torch.tensor(1 / 3).log()) * given["mask"]
    torch.testing.assert_close(total, expected.sum())
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


def related(std: float, distance: float) -> dict[str, Tensor]:
    """Two models of bf16 whose logits have a standard deviation of about `std`, and differ by `distance` of it."""
    generator = torch.Generator().manual_seed(0)
    tokens, hidden, vocabulary = 32, 256, 8192
    given = {"hidden": torch.randn(tokens, hidden, generator=generator)}
    given["weight"] = torch.randn(vocabulary, hidden, generator=generator) * std / hidden**0.5
    for name, scale in (("hidden", 1), ("weight", std / hidden**0.5)):
        noise = torch.randn(given[name].shape, generator=generator)
        given[f"teacher_{name}"] = given[name] + distance * scale * noise
    given = {name: value.bfloat16() for name, value in given.items()}
    labels = torch.randint(vocabulary, (tokens,), generator=generator)
    return {**given, "labels": labels, "mask": torch.ones(tokens)}


# At standard deviations of the logits of 1, 3 and 8: distances with a forward KL of 0.003, 0.03 and 0.3.
@pytest.mark.parametrize(
    ("std", "distance", "kl"),
    [
        *((1, 0.055, 0.003), (1, 0.17, 0.03), (1, 0.5, 0.3)),
        *((3, 0.019, 0.003), (3, 0.06, 0.03), (3, 0.19, 0.3)),
        *((8, 0.0095, 0.003), (8, 0.029, 0.03), (8, 0.1, 0.3)),
    ],
)
def test_bf16_is_exact_but_for_one_rounding_of_the_gradient(std: float, distance: float, kl: float) -> None:
    given = related(std, distance)
    for spec in (*(KdConfig(divergence) for divergence in Divergence), KdConfig(kd_weight=0.5, lm_weight=0.5)):
        ours = chunked(given, dataclasses.replace(spec, chunk_tokens=24))
        reference = plain(given, spec)
        if spec == KdConfig():
            assert reference[0] / len(given["mask"]) == pytest.approx(kl, rel=0.4)
        # float32 has an error of 6e-8 of logits up to 30, and the smallest losses are 0.0008 (Jensen-Shannon).
        assert abs(ours[0] - reference[0]) < 1e-5 * max(reference[0], torch.tensor(0.003 * len(given["mask"])))
        for mine, exact in zip(ours[1:], reference[1:], strict=True):
            assert mine.dtype is torch.bfloat16
            # bf16 rounds to 8 bits, 2e-3 at most: the logits' gradient, and the results.
            assert (mine.double() - exact).norm() < 5e-3 * exact.norm()


@pytest.mark.parametrize("tied", [False, True])
def test_the_weight_gradient_goes_to_megatrons_buffer(tied: bool) -> None:
    given, spec = tensors(), KdConfig()
    weight = torch.nn.Parameter(given["weight"].clone())
    weight.main_grad = torch.ones_like(weight)  # type: ignore[attr-defined]
    weight.grad_added_to_main_grad = False  # type: ignore[attr-defined]
    weight.zero_out_wgrad = tied  # type: ignore[attr-defined]
    teacher = Head(given["teacher_hidden"], given["teacher_weight"])
    total, _ = distillation_loss(Head(given["hidden"], weight), teacher, None, given["mask"], spec)
    total.backward()
    assert weight.grad_added_to_main_grad  # type: ignore[attr-defined]
    assert weight.grad is not None
    if tied:  # what the embedding adds to it is added to the buffer once more
        assert not weight.grad.any()
    assert_close((weight.main_grad - 1,), plain(given, spec)[2:])  # type: ignore[attr-defined]


@pytest.mark.parametrize("rows", [60, 45, 8])
@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec.top_k != VOCABULARY - 1], ids=ids)
def test_a_teacher_with_fewer_ids_is_compared_on_those(spec: KdConfig, rows: int) -> None:
    given, spec = tensors(teacher=rows), dataclasses.replace(spec, chunk_tokens=8)
    # What the rows beyond the teacher's contain does not count.
    padded = torch.cat([given["teacher_weight"], torch.full((VOCABULARY - rows, TEACHER), 5.0)])
    assert_close(chunked(given, spec, Head(given["teacher_hidden"], padded), rows), plain(given, spec))


def test_a_student_that_gives_the_teachers_ids_no_probability_gets_a_finite_loss() -> None:
    given = tensors(teacher=30)
    given["weight"][30:] *= 100
    teacher = Head(given["teacher_hidden"], torch.cat([given["teacher_weight"], torch.zeros(31, TEACHER)]))
    for spec in (spec for spec in SPECS if not spec.top_k):
        total, *gradients = chunked(given, spec, teacher, 30)
        # Logits of up to 600, from whose maximum all are subtracted, have an error of 3e-5 in float32.
        assert_close((total, *gradients), plain(given, spec), atol=6e-5)


def test_cached_logits_of_fewer_ids_match_the_live_teacher() -> None:
    given, spec = tensors(teacher=45), KdConfig(top_k=9, temperature=1.5, lm_weight=0.25, chunk_tokens=8)
    logits = given["teacher_hidden"] @ given["teacher_weight"].t() / spec.temperature
    stored = select_top_k(logits - logits.amax(-1, keepdim=True), 9, Vocabulary(45))
    assert_close(chunked(given, dataclasses.replace(spec, top_k=None), stored, 45), plain(given, spec))


def test_descending_moves_the_mass_outside_to_the_teachers_ids() -> None:
    """The reason for the loss's second part: without it, nothing would move the logits of ids without a teacher."""
    given, spec = tensors(teacher=40), KdConfig(chunk_tokens=8)
    teacher = Head(given["teacher_hidden"], torch.cat([given["teacher_weight"], torch.zeros(21, TEACHER)]))
    before = outside(given)
    for _ in range(200):
        _, grad_hidden, grad_weight = chunked(given, spec, teacher, 40)
        given["hidden"] -= grad_hidden
        given["weight"] -= 0.03 * grad_weight
    assert before > 0.2
    assert outside(given) < 0.1 * before


def outside(given: dict[str, Tensor]) -> float:
    """The student's mean probability of the ids that only it has."""
    q = torch.softmax(given["hidden"] @ given["weight"].t(), -1)[given["mask"] == 1]
    return float(q[:, len(given["teacher_weight"]) :].sum(-1).mean())


def sliced(specs: list[KdConfig], teacher_vocabulary: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return the loss, the gradient of the hidden states summed over ranks, and the rank's shard of the weight's."""
    group, rank, ranks = torch.distributed.group.WORLD, torch.distributed.get_rank(), torch.distributed.get_world_size()
    given = tensors(vocabulary=2 * 31, teacher=teacher_vocabulary)
    rows = slice_rows(given["teacher_weight"].chunk(ranks)[rank], 2 * 31, group)
    results = []
    for spec in specs:
        hidden = given["hidden"].clone().requires_grad_()
        weight = given["weight"].chunk(ranks)[rank].clone().requires_grad_()
        teacher = Head(given["teacher_hidden"], rows)
        heads = Head(hidden, weight), teacher
        total, _ = distillation_loss(*heads, given["labels"], given["mask"], spec, group, teacher_vocabulary)
        total.backward()
        assert hidden.grad is not None
        assert weight.grad is not None
        torch.distributed.all_reduce(hidden.grad)
        results.append((total.detach(), hidden.grad, weight.grad))
    return results


# Equal; larger; smaller; so small that the second rank of the student's has none of its ids.
@pytest.mark.parametrize("teacher", [2 * 31, 2 * 34, 2 * 27, 2 * 13])
def test_a_sharded_vocabulary_gives_the_same_loss(teacher: int) -> None:
    """The same ids of student and teacher lie on different ranks where their vocabularies differ."""
    specs = [dataclasses.replace(spec, chunk_tokens=8) for spec in SPECS if (spec.top_k or 0) < min(teacher, 60)]
    first, second = run_ranks(sliced, 2, specs, teacher)
    given = tensors(vocabulary=2 * 31, teacher=teacher)
    for spec, mine, other in zip(specs, first, second, strict=True):
        assert torch.equal(mine[0], other[0])
        assert_close((*mine[:2], torch.cat([mine[2], other[2]])), plain(given, spec))
