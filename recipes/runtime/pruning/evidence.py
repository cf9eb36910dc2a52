"""What pruning found, for people: tables as plain data, and plots as SVG."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from recipes.runtime import plots
from recipes.runtime.plots import GREY
from recipes.runtime.pruning.importance import Importance

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


def importance_plot(table: dict[str, Any], path: Path) -> None:
    """A panel an axis: layers, heads, FFN channels, hidden channels."""
    figure, (layers, heads, ffn, hidden) = plots.figure(4, (12.8, 3.2))
    numbers = [row["layer"] for row in table["layers"]]
    layers.bar(numbers, [row["score"] for row in table["layers"]], color="#4169e1")
    for row in table["layers"]:
        heads.scatter([row["layer"]] * len(row["heads"]), row["heads"], color="#2e8b57", s=12)
    quantiles = list(zip(*(row["ffn_quantiles"] for row in table["layers"]), strict=True))
    ffn.fill_between(numbers, quantiles[0], quantiles[-1], color="#b8860b", alpha=0.25, linewidth=0)
    ffn.fill_between(numbers, quantiles[1], quantiles[-2], color="#b8860b", alpha=0.35, linewidth=0)
    ffn.plot(numbers, quantiles[2], color="#b8860b")
    hidden.plot(sorted(table["hidden_size"], reverse=True), color="#b22222")
    words = ("layers", "attention heads", "FFN channels: median, 50 %, 90 %", "hidden channels, sorted")
    for axes, title in zip((layers, heads, ffn, hidden), words, strict=True):
        axes.set_title(title, color=GREY, fontsize="medium")
        axes.set_xlabel("rank" if axes is hidden else "layer", color=GREY)
        axes.set_ylim(bottom=0)
    for axes in (layers, heads, ffn):
        axes.xaxis.get_major_locator().set_params(integer=True)
    layers.set_ylabel("importance", color=GREY)
    _save(figure, path)


def pareto_plot(candidates: list[dict[str, Any]], teacher: dict[str, Any], path: Path) -> None:
    """Loss over parameters of every candidate that was scored: just pruned, and after each round that it took part in.

    Args:
        candidates: rows of a candidate table: `params`, `num_layers`, `loss`, `front`, and `rounds` where distilled.
        teacher: `params` and `loss`.
    """
    figure, (axes,) = plots.figure(1, (7.2, 4.0))
    depths = sorted({row["num_layers"] for row in candidates})
    markers = "osD^v<>P*X"
    for index, depth in enumerate(depths):
        rows = [row for row in candidates if row["num_layers"] == depth]
        mark = {"marker": markers[index % len(markers)], "s": 26, "color": f"C{index % 10}"}
        axes.scatter(_millions(rows), [row["loss"] for row in rows], label=f"{depth} layers, just pruned", **mark)
        distilled = [(row["params"] / 1e6, entry["val_loss"]) for row in rows for entry in row.get("rounds", [])]
        if distilled:
            mark |= {"color": "none", "edgecolors": f"C{index % 10}"}
            axes.scatter(*zip(*distilled, strict=True), label=f"{depth} layers, after a round", **mark)
    front = sorted((row for row in candidates if row["front"]), key=lambda row: row["params"])
    line = {"color": GREY, "linewidth": 1, "label": "Pareto front, just pruned"}
    axes.plot(_millions(front), [row["loss"] for row in front], **line)
    axes.axhline(teacher["loss"], color=GREY, linestyle="--", label="teacher")
    axes.set_xlabel("million parameters", color=GREY)
    axes.set_ylabel("held-out loss (nats per token)", color=GREY)
    figure.legend(loc="outside right upper", frameon=False, labelcolor=GREY, fontsize="small")
    _save(figure, path)


def mark_front(rows: list[dict[str, Any]]) -> None:
    """Sets `front` on the rows that no other beats in parameters, latency (where measured) and loss at once."""
    for row in rows:
        row["front"] = not any(_beats(other, row) for other in rows)


def _beats(one: dict[str, Any], other: dict[str, Any]) -> bool:
    pairs = [(one[key], other[key]) for key in ("params", "loss", "latency_ms") if one.get(key) is not None]
    return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)


def _millions(rows: list[dict[str, Any]]) -> list[float]:
    return [row["params"] / 1e6 for row in rows]


def _save(figure: Any, path: Path) -> None:
    partial = path.with_name(f".{path.name}")
    plots.save_svg(figure, partial)
    os.replace(partial, path)
