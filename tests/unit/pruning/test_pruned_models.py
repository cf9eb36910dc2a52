"""Importance, pruning and search scores on tiny models, compared with models pruned by hand."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from prune_distill.errors import InputError
from prune_distill.nemo import backend

backend.activate()

from prune_distill.pruning import latency, layer_sets, losses  # noqa: E402
from prune_distill.pruning.cutting import complete_sizes, cut  # noqa: E402
from prune_distill.pruning.importance import Importance  # noqa: E402
from prune_distill.pruning.latency import LatencyTable  # noqa: E402
from prune_distill.pruning.search_space import convert_to_search_space, dynamic_core, measure, restore_scores  # noqa: E402
from prune_distill.pruning.subnets import Subnets  # noqa: E402
from prune_distill.schema import PruneConfig  # noqa: E402
from tests.helpers.one_rank import (  # noqa: E402
    SHAPE,
    VOCABULARY,
    core_model,
    nemo_model,
    one_rank,
    positions,
    write_data,
)

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(scope="module", autouse=True)
def _one_rank() -> Iterator[None]:
    with one_rank():
        yield


def teacher() -> Any:
    return core_model(seed=3, modelopt_spec=True)


def sequences(count: int = 3, length: int = 9) -> Tensor:
    return torch.randint(VOCABULARY, (count, length), generator=torch.Generator().manual_seed(11))


def logits_of(core: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return core(ids, positions(ids), None)


def loss_of(core: Any, rows: Tensor) -> float:
    """The mean cross-entropy of the next token of sequences `[b, s + 1]`."""
    logits = logits_of(core, rows[:, :-1])
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()).item()


@contextmanager
def watched(modules: dict[str, Any], inputs: bool) -> Iterator[dict[str, list[Tensor]]]:
    """Record inputs or outputs of modules, call by call."""
    found: dict[str, list[Tensor]] = {name: [] for name in modules}
    handles = []
    for name, module in modules.items():
        if inputs:
            handles.append(module.register_forward_hook(lambda _, i, __, n=name: found[n].append(i[0].detach())))
        else:
            handles.append(module.register_forward_hook(lambda _, __, o, n=name: found[n].append(o.detach())))
    yield found
    for handle in handles:
        handle.remove()


def measured(core: Any, rows: Tensor) -> Importance:
    """Measure importance one sequence at a time, like the calibration."""

    def forward() -> None:
        for row in rows:
            core(row[None], positions(row[None]), None)

    return measure(core, forward)


def test_importance_matches_minitron() -> None:
    rows = sequences()
    plain = teacher()
    parts: dict[str, Any] = {}
    for number, layer in enumerate(plain.decoder.layers, 1):
        parts |= {f"{number}.norm.0": layer.input_layernorm, f"{number}.norm.1": layer.pre_mlp_layernorm}
    ends = {f"{n}.ffn": layer.mlp.linear_fc2 for n, layer in enumerate(plain.decoder.layers, 1)}
    ends |= {f"{n}.heads": layer.self_attention.linear_proj for n, layer in enumerate(plain.decoder.layers, 1)}
    layers = {str(n): layer for n, layer in enumerate(plain.decoder.layers, 1)}
    states: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in layers}
    hooks = [
        layer.register_forward_hook(
            lambda _, args, kwargs, output, n=name: states[n].append(
                (kwargs.get("hidden_states", args[0] if args else None), output[0])
            ),
            with_kwargs=True,
        )
        for name, layer in layers.items()
    ]
    with watched(parts, inputs=False) as norms, watched(ends, inputs=True) as inputs:
        for row in rows:
            logits_of(plain, row[None])
    for hook in hooks:
        hook.remove()
    importance = measured(teacher(), rows)
    assert list(importance.layers) == [1, 2, 3, 4]
    for number in importance.layers:
        distance = sum(
            1 - torch.nn.functional.cosine_similarity(before, after, dim=-1).mean().item()
            for before, after in states[str(number)]
        )
        assert importance.layers[number] == pytest.approx(distance, rel=1e-3, abs=1e-5)
        # `[s, 1, channels]`: squared means of magnitudes over a sequence, summed over sequences.
        squares = lambda values: sum(value.abs().mean(0).pow(2).sum(0) for value in values)  # noqa: E731
        torch.testing.assert_close(importance.ffn[number], squares(inputs[f"{number}.ffn"]), **CLOSE)
        torch.testing.assert_close(importance.heads[number], squares(inputs[f"{number}.heads"]), **CLOSE)
        for index in range(2):
            expected = squares(norms[f"{number}.norm.{index}"])
            torch.testing.assert_close(importance.hidden[number][index], expected, **CLOSE)


def test_scores_are_restored_in_another_search_space() -> None:
    importance = measured(teacher(), sequences())
    core = convert_to_search_space(teacher())
    assert core is dynamic_core(core)
    restore_scores(importance, core)
    for layer in core.decoder.layers:
        number = layer.layer_number
        assert layer._scores == importance.layers[number]
        assert torch.equal(layer.mlp._activations, importance.ffn[number])
        assert torch.equal(layer.self_attention._activations, importance.heads[number])
        first, second = (core._activations[id(norm)] for norm in (layer.input_layernorm, layer.pre_mlp_layernorm))
        assert torch.equal(first, importance.hidden[number][0])
        assert torch.equal(second, importance.hidden[number][1])


def test_a_non_finite_teacher_is_rejected_with_its_layer() -> None:
    core = teacher()
    core.decoder.layers[2].mlp.linear_fc2.weight.data[0, 0] = torch.inf
    with pytest.raises(InputError, match="layer [34]"):
        measured(core, sequences())


def test_a_cut_keeps_the_channels_of_the_highest_scores() -> None:
    plain, core = teacher(), teacher()
    importance = measured(teacher(), sequences())
    for number in importance.layers:  # the last half of the channels, in reverse order
        importance.ffn[number] = torch.arange(128.0)
    cut(core, {"ffn_hidden_size": 64}, [], importance)
    for before, after in zip(plain.decoder.layers, core.decoder.layers, strict=True):
        down, up = before.mlp.linear_fc2.weight, before.mlp.linear_fc1.weight.view(2, 128, 64)
        kept = torch.arange(127, 63, -1)
        assert torch.equal(after.mlp.linear_fc2.weight, down[:, kept])
        assert torch.equal(after.mlp.linear_fc1.weight.view(2, 64, 64), up[:, kept])
    assert core.config.ffn_hidden_size == 64


def test_layers_that_are_named_are_dropped() -> None:
    plain, core = teacher(), teacher()
    cut(core, {}, [2, 4], None)
    plain.decoder.layers = torch.nn.ModuleList(plain.decoder.layers[n] for n in (0, 2))
    assert core.config.num_layers == 2
    rows = sequences()
    torch.testing.assert_close(logits_of(core, rows), logits_of(plain, rows))


def test_depth_is_pruned_by_importance() -> None:
    core, plain = teacher(), teacher()
    importance = measured(teacher(), sequences())
    importance = dataclasses.replace(importance, layers={1: 0.3, 2: 0.1, 3: 0.2, 4: 0.4})
    cut(core, {"num_layers": 2}, [], importance)
    plain.decoder.layers = torch.nn.ModuleList(plain.decoder.layers[n] for n in (0, 3))
    torch.testing.assert_close(logits_of(core, sequences()), logits_of(plain, sequences()))


def test_modelopt_gets_heads_and_groups_together() -> None:
    config = SimpleNamespace(num_attention_heads=8, num_query_groups=4)
    every = {"num_layers": None, "hidden_size": 64, "ffn_hidden_size": None}
    assert complete_sizes(every, config) == {"hidden_size": 64}
    assert complete_sizes({"num_attention_heads": 4}, config) == {"num_attention_heads": 4, "num_query_groups": 4}
    assert complete_sizes({"num_query_groups": 2}, config) == {"num_attention_heads": 8, "num_query_groups": 2}
    assert complete_sizes({"num_moe_experts": 2, "other": 3}, config) == {"num_moe_experts": 2}


SHAPES = [
    (SHAPE, []),
    (SHAPE, [2]),
    (dataclasses.replace(SHAPE, hidden_size=32, ffn_hidden_size=64), [1, 3]),
    (dataclasses.replace(SHAPE, num_attention_heads=2, num_query_groups=1), []),
]


def test_search_scores_match_pruned_models() -> None:
    rows = sequences(4)
    importance = measured(teacher(), sequences())
    subnets = Subnets(teacher(), importance, SHAPE)
    whole, found = subnets.scores(SHAPES, list(rows.split(3)))
    plain = teacher()
    assert whole == pytest.approx(loss_of(plain, rows), rel=1e-4)
    reference = logits_of(plain, rows[:, :-1]).log_softmax(-1)
    names = ("hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups")
    for (shape, dropped), (loss, kl) in zip(SHAPES, found, strict=True):
        core = teacher()
        sizes = {name: getattr(shape, name) for name in names if getattr(shape, name) != getattr(SHAPE, name)}
        cut(core, complete_sizes(sizes, core.config), dropped, importance)
        student = logits_of(core, rows[:, :-1]).log_softmax(-1)
        assert loss == pytest.approx(loss_of(core, rows), rel=1e-4)
        # Weighted by the teacher's probabilities.
        expected = (reference.exp() * (reference - student)).sum(-1).mean().item()
        assert kl == pytest.approx(expected, rel=1e-3, abs=1e-5)
        other_way = (student.exp() * (student - reference)).sum(-1).mean().item()
        assert expected == 0 or abs(other_way - expected) > 0.01 * expected
    assert found[0] == pytest.approx((whole, 0.0), abs=1e-6)
    assert subnets.core.config.hidden_size == 64
    assert logits_of(subnets.core, rows).shape == (4, 9, VOCABULARY)


def test_divergence_and_cross_entropy_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "CHUNK", 2)
    student = torch.tensor([[[0.5, 0.5], [0.25, 0.75], [0.5, 0.5]]]).log()
    other = torch.tensor([[[0.5, 0.5], [0.5, 0.5], [0.75, 0.25]]]).log()
    by_hand = 0.5 * np.log(0.5 / 0.25) + 0.5 * np.log(0.5 / 0.75) + 0.75 * np.log(1.5) + 0.25 * np.log(0.5)
    assert losses.divergence(student, other) == pytest.approx(by_hand, rel=1e-5)
    found = losses.cross_entropy(student, torch.tensor([[0, 0, 1]]))
    assert found == pytest.approx(-np.log(0.5) - np.log(0.25) - np.log(0.5), rel=1e-5)


def data_of(folder: Path) -> Any:
    """Training documents of ids below 20, held-out ones above."""
    return write_data(folder, {"a": [[*range(1, 20), 0]] * 3}, [[*range(20, 40), 0]] * 2)


def test_the_search_reads_held_out_documents_and_calibration_training_ones(tmp_path: Path) -> None:
    data, prune = data_of(tmp_path), PruneConfig(calibration_seq_length=4, micro_batch_size=2)
    held_out = torch.cat(losses.held_out_batches(data, prune, 3, "cpu"))
    assert held_out.tolist() == [[20, 21, 22, 23, 24], [24, 25, 26, 27, 28], [28, 29, 30, 31, 32]]
    batches = losses.calibration_batches(data, prune, 5, 3, "cpu")
    assert [len(batch) for batch in batches] == [2, 2, 1]
    tokens = data.tokens("train")
    rows = torch.cat(batches)
    assert all(any(row.tolist() == tokens[s : s + 5].tolist() for s in range(0, 56, 4)) for row in rows)
    assert len({tuple(row.tolist()) for row in rows}) > 1
    assert all(token < 20 for token in rows.flatten().tolist())
    again = torch.cat(losses.calibration_batches(data, prune, 5, 3, "cpu"))
    other = torch.cat(losses.calibration_batches(data, prune, 5, 4, "cpu"))
    assert torch.equal(rows, again)
    assert not torch.equal(rows, other)
    # All tokens: 59 and one to predict make 14 sequences of 4.
    assert len(torch.cat(losses.calibration_batches(data, prune, 99, 3, "cpu"))) == 14
    assert len(torch.cat(losses.held_out_batches(data, prune, 99, "cpu"))) == 10
    with pytest.raises(InputError, match="calibration_seq_length"):
        losses.held_out_batches(data, PruneConfig(calibration_seq_length=42), 1, "cpu")
    assert len(losses.held_out_batches(data, PruneConfig(calibration_seq_length=41), 1, "cpu")) == 1


def test_losses_without_sets_of_layers() -> None:
    core, rows = teacher(), sequences(4)
    sets = [[1], [2, 3], []]
    found = layer_sets.compute_ablation_losses(core, list(rows.split(3)), sets)
    for layers, loss in zip(sets, found, strict=True):
        reference = teacher()
        kept = [layer for n, layer in enumerate(reference.decoder.layers, 1) if n not in layers]
        reference.decoder.layers = torch.nn.ModuleList(kept)
        assert loss == pytest.approx(loss_of(reference, rows), rel=1e-4)
    assert len(core.decoder.layers) == 4


def test_layer_sets_with_the_lowest_loss_come_first() -> None:
    core, rows = teacher(), list(sequences(4).split(4))
    sets = layer_sets.list_blocks(4, 2)
    assert sets == [[1, 2], [2, 3], [3, 4]]
    by_loss = sorted(zip(layer_sets.compute_ablation_losses(core, rows, sets), sets, strict=True))
    assert len({loss for loss, _ in by_loss}) == 3
    assert layer_sets.find_best(core, rows, sets, 2) == [layers for _, layers in by_loss[:2]]
    assert layer_sets.find_best(core, rows, sets, 0) == layer_sets.find_best(core, rows, [], 2) == []
    assert layer_sets.list_blocks(4, 4) == [[1, 2, 3, 4]]


def test_latency_is_the_sum_of_its_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer takes 1 ms plus a hundredth of its FFN, the rest 10 ms."""
    built: list[Any] = []

    def milliseconds(core: Any, ids: Tensor) -> float:
        built.append(core.config)
        logits_of(core, ids)  # it runs
        return 10 + sum(1 + layer.mlp.linear_fc2.weight.shape[1] / 100 for layer in core.decoder.layers)

    monkeypatch.setattr(latency, "_milliseconds", milliseconds)
    table = LatencyTable(nemo_model(), (64, 128), sequences())
    assert table(SHAPE) == pytest.approx(10 + 4 * (1 + 1.28))
    assert table(dataclasses.replace(SHAPE, ffn_hidden_size=96, num_layers=3)) == pytest.approx(10 + 3 * (1 + 0.96))
    assert table(dataclasses.replace(SHAPE, ffn_hidden_size=64)) == pytest.approx(10 + 4 * (1 + 0.64))
    assert len(table.measured) == 2
    narrow = dataclasses.replace(SHAPE, hidden_size=32, num_attention_heads=2, num_query_groups=1)
    assert table(narrow) == pytest.approx(10 + 4 * (1 + 1.28))
    assert len(table.measured) == 4
    last = built[-1]
    assert (last.hidden_size, last.num_attention_heads, last.num_query_groups) == (32, 2, 1)
    rows = table.table()["rows"]
    assert [tuple(row.values())[:4] for row in rows] == [
        (64, 4, 2, 64),
        (64, 4, 2, 128),
        (32, 2, 1, 64),
        (32, 2, 1, 128),
    ]
    assert [row["layer_ms"] for row in rows] == pytest.approx([1.64, 2.28] * 2)
    assert [row["around_ms"] for row in rows] == [10.0] * 4
    assert (table.table()["batch_size"], table.table()["seq_length"]) == (3, 9)
    one = LatencyTable(nemo_model(), (128, 128), sequences())
    assert one(SHAPE) == pytest.approx(10 + 4 * (1 + 1.28))


def test_the_fastest_pass_after_the_warmup_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    # The warmup has the shortest passes; the fastest of the others is the third, 4 ms.
    durations = [1, 2, 9, 8, 4, 7, 6, 5, 9]
    clock = iter([moment for n, ms in enumerate(durations) for moment in (n, n + ms / 1000)])
    monkeypatch.setattr(latency, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    seen: list[Tensor] = []
    core = lambda ids, places, mask: seen.append(places)  # noqa: E731
    assert latency._milliseconds(core, sequences()) == pytest.approx(4)
    assert len(seen) == len(durations)
    assert torch.equal(seen[0], torch.arange(9).expand(3, -1))


def test_skipped_layers_are_restored_after_an_error() -> None:
    core = teacher()
    seen: list[int] = []

    def fail() -> None:
        with losses.skip_layers(core, [1, 4]):
            seen.extend(layer.layer_number for layer in core.decoder.layers)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert seen == [2, 3]
    assert len(core.decoder.layers) == 4


def test_layers_keep_their_numbers_through_pruning() -> None:
    from prune_distill.nemo import nemo_api

    core = teacher()
    nemo_api.number_layers(core)
    cut(core, {}, [1, 3], None)
    assert nemo_api.kept_layers(core) == [2, 4]
    assert nemo_api.count_parameters(core) == sum(p.numel() for p in core.parameters())
