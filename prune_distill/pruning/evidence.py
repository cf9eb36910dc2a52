"""What pruning found, for people: tables as plain data (`prune_distill.reporting.plots` draws them)."""

from __future__ import annotations

from typing import Any

import torch

from prune_distill.pruning.importance import Importance

# The query groups of the plots are few enough to be named by colour; channels are not, so that their spread is shown.
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def importance_table(importance: Importance, config: Any) -> dict[str, Any]:
    """Importance per layer and axis, higher is more important.

    Returns:
        `layers`: by layer, its score, its query groups' and heads' scores, and quantiles of its FFN channels' scores;
            of a mixture also its experts' scores, as ModelOpt ranks them, and the tokens that each was sent;
        `hidden_size`: each hidden channel's score, as ModelOpt sums it over all norms.
    """
    groups = config.num_query_groups
    rows = []
    for number, score in importance.layers.items():
        # ModelOpt 0.40 itself ranks a group by heads of several: it takes the heads for [heads of a group, groups],
        # though they are [groups, heads of a group] (modelopt/torch/nas/plugins/megatron.py:660, against :367).
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
    """Sets `front` on the rows that no other beats in parameters, latency (where measured) and loss at once."""
    for row in rows:
        row["front"] = not any(_beats(other, row) for other in rows)


def _beats(one: dict[str, Any], other: dict[str, Any]) -> bool:
    pairs = [(one[key], other[key]) for key in ("params", "loss", "latency_ms") if one.get(key) is not None]
    return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)


def best_first(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """By loss, round robin over the sets of dropped layers: the best without each set, then the second of each.

    Just after pruning, a loss says little of a deeper against a wider shape, or of one set of layers against another:
    rankings between them turn around within a few hundred steps of distillation. Among shapes that keep the same layers
    it says more.
    """
    by_layers: dict[tuple[int, ...], list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: row["loss"]):
        by_layers.setdefault(tuple(row["drop_layers"]), []).append(row)
    turns = {id(row): turn for same in by_layers.values() for turn, row in enumerate(same)}
    return sorted(rows, key=lambda row: (turns[id(row)], row["loss"]))
