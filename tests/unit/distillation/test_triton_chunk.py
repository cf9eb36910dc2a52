"""The kernels of the loss, interpreted on the CPU, compared with the plain float64 implementation; and compiled."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from prune_distill.distillation.kd_loss import check_implementation
from prune_distill.errors import InputError
from prune_distill.schema import Divergence, KdConfig, LossImplementation
from tests.helpers.interpreted_kernels import compiled_sizes, losses, token_losses
from tests.helpers.ranks import run_ranks
from tests.unit.distillation.test_kd_loss import assert_close, plain, tensors

CASES = [
    KdConfig(temperature=2.5),
    KdConfig(Divergence.reverse_kl),
    KdConfig(Divergence.reverse_kl, temperature=1.5, kd_weight=0.7, lm_weight=0.3),
    KdConfig(Divergence.jensen_shannon, temperature=2.0),
    KdConfig(lm_weight=0.3),
    KdConfig(kd_weight=0.0, lm_weight=1.0),
]


@pytest.mark.parametrize(("ranks", "teacher"), [(1, 2 * 31), (2, 2 * 31), (2, 2 * 34)])
def test_the_kernels_match_the_plain_implementation(ranks: int, teacher: int) -> None:
    """Also with the vocabulary shared by two ranks, whose maxima differ, and with a teacher of more ids."""
    specs = [dataclasses.replace(spec, chunk_tokens=30) for spec in CASES]
    found = run_ranks(losses, ranks, specs, teacher)
    given = tensors(vocabulary=2 * 31, teacher=teacher)
    for spec, *parts in zip(specs, *found, strict=True):
        assert all(torch.equal(part[0], parts[0][0]) for part in parts)
        assert_close((*parts[0][:2], torch.cat([part[2] for part in parts])), plain(given, spec))


def test_without_gradients_the_losses_are_the_same() -> None:
    spec = KdConfig(Divergence.jensen_shannon, temperature=2.0, lm_weight=0.5, chunk_tokens=8)
    ((kd, lm),) = run_ranks(token_losses, 1, spec)
    total = ((kd + 0.5 * lm) * tensors()["mask"]).sum()
    torch.testing.assert_close(total.double(), plain(tensors(), spec)[0], rtol=1e-6, atol=0)


def test_the_kernels_compile_for_hopper() -> None:
    (sizes,) = run_ranks(compiled_sizes, 1, 90)
    # A divergence or none, with and without cross-entropy; the sums of Jensen-Shannon have no variants.
    assert len(sizes) == 4 * 2 + 1 + 4 * 2
    assert all(size > 1000 for size in sizes.values())


@pytest.mark.parametrize(
    ("installed", "device", "problem"),
    [(False, "cuda", "the package triton is not installed"), (True, "cpu", "Triton needs a GPU")],
)
def test_a_machine_that_cannot_run_them_is_named(
    monkeypatch: pytest.MonkeyPatch, installed: bool, device: str, problem: str
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if installed else None)
    kernels = KdConfig(implementation=LossImplementation.triton)
    with pytest.raises(InputError, match=f"distill.kd.implementation=triton: {problem}.*set .*=chunked"):
        check_implementation(kernels, device)
    check_implementation(KdConfig(), device)
    if installed:
        check_implementation(kernels, "cuda")
