"""Tables of pruning results as plain data (`prune_distill.reporting.plots` draws them)."""

from __future__ import annotations

from typing import Any

import torch

from prune_distill.pruning.importance import Importance

# Plots show each query group in its own color; there are too many channels, so their quantiles are shown.
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def importance_table(importance: Importance, config: Any) -> dict[str, Any]:
    """Return the importance per layer and axis; higher is more important.

    Returns:
        `layers`: for each layer, its score, the scores of its query groups and heads, and quantiles of the scores of
        its
            FFN channels; for a mixture also the scores of its experts, as ModelOpt ranks them, and their tokens;
        `hidden_size`: the score of each hidden channel, which ModelOpt sums over all norms.
    """
    groups = config.num_query_groups
    rows = []
    for number, score in importance.layers.items():
        # ModelOpt 0.40 mixes heads of different groups when it ranks a group: it reads the heads as
        # [heads per group, groups], but they are [groups, heads per group] (modelopt/torch/nas/plugins/megatron.py:660,
        # against :367).
        heads = importance.heads[number].sqrt().view(config.num_attention_heads, -1).norm(dim=1)
        rows.append(
            {
                "layer": number,
                "score": score,
                "heads": heads.tolist(),
                "query_groups": heads.view(groups, -1).norm(dim=1).tolist(),
                "ffn_quantiles": importance.ffn[number].float().sqrt().quantile(torch.tensor(QUANTILES)).tolist(),
            }
        )
        if importance.experts:
            norms, tokens = importance.experts[number]
            rows[-1] |= {"experts": (norms / tokens.clamp(min=1)).tolist(), "expert_tokens": tokens.int().tolist()}
    hidden = sum(norm.sqrt() for norms in importance.hidden.values() for norm in norms)
    return {"layers": rows, "quantiles": list(QUANTILES), "hidden_size": hidden.tolist()}  # type: ignore[union-attr]


def mark_front(rows: list[dict[str, Any]]) -> None:
    """Set `front` on the rows of the Pareto front of parameters, latency (if measured) and loss."""
    for row in rows:
        row["front"] = not any(_dominates(other, row) for other in rows)


def _dominates(one: dict[str, Any], other: dict[str, Any]) -> bool:
    pairs = [(one[key], other[key]) for key in ("params", "loss", "latency_ms") if one.get(key) is not None]
    return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)


def best_first(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Sort rows by loss, round robin over the sets of dropped layers: the best of each set, then the second of each.

    Right after pruning, the loss is a poor predictor between shapes of different depth or with different layers: their
    ranking changes within a few hundred steps of distillation. It is better among shapes that keep the same layers.
    """
    by_layers: dict[tuple[int, ...], list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: row["loss"]):
        by_layers.setdefault(tuple(row["drop_layers"]), []).append(row)
    ranks = {id(row): rank for same in by_layers.values() for rank, row in enumerate(same)}
    return sorted(rows, key=lambda row: (ranks[id(row)], row["loss"]))
