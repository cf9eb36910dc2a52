"""python -m launch.plan experiment=NAME cluster=NAME [key=value ...] [--what-if] [--json]

What a run will need, before it starts: parameters, memory of a rank, hours, disk, and the layouts that fit. Nothing is
started, downloaded or written. Exit status: 0, 1 where the plan does not fit, 2 for what is wrong in the config.

`--json` prints one object (bytes, hours and FLOP as numbers; null where `cluster.gpu` or what else it takes is not
stated; new keys may come, these stay):

experiment      its name
cluster         name, nodes, devices_per_node, ranks, gpu (name, memory_bytes, bf16_flops, utilisation), time_limit
automatic       the keys that were `auto`, for which values were chosen
models          teacher, student, and original (the model that is pruned; null if it is the teacher): parameters and
                sizes (with a budget, of the largest candidate); source_teachers: those of single sources, by the suffix
                of their stages, with their sources and layout; candidates: shapes, least and most parameters, or null;
                cut: share of the parameters that pruning removes
training        steps, tokens, tokens_a_step, flops, flops_a_token (student, teacher, recompute, total)
fp8             the scales of FP8 by model (student, teacher); empty without FP8
signal          of cached logits: tensor, pipeline, micro_batch_size (the teacher's layout), top_k, bytes (at most),
                flops_a_token, spared_share (of further students); or null
stages          a list: stage, ranks, hours, gpu_hours, jobs (those that a time limit cuts it into, at least), cost
partial         of stages without hours, what is known: stage, ranks, bound (at least, or about), seconds, work (what
                takes them), omitted (what is not estimated)
step            seconds of a step of the distillation by what takes them, and total; null without the GPU's figures
memory          distill: a list, one a pipeline stage; prune: its largest. Each: weights, gradients, optimizer, teacher,
                activations, loss, reserve, total (bytes; the reserve is an assumption, and 0 where the GPU is not
                stated). Lists, where a run has them: correct_teacher, cache_logits
layout          the present one: tensor, pipeline, context, data, micro_batch_size, recompute, peak, seconds (of a step)
loss_chunk      tokens of a chunk of the loss; null with distill.kd.implementation=upstream
layouts         those that fit, best first; undivided: values that keep others from dividing
kv_cache        bytes of the student's in an engine, in 16 bits: token, longest (a sequence of max_position_embeddings),
                benchmark (its sequences, or null); halved: whether quantized students have half; null for a run that
                neither quantizes nor benchmarks the student
disk            tokens, teacher, students, checkpoints, signal (if stored), total; written: of that; free (bytes)
warnings        sentences
fits            true, false, or null where the GPU is not stated
impossible      a sentence by stage: those whose tensors alone, without the reserve, are more than the GPU holds
fix             what to set where it does not fit, else null
what_if         with --what-if a list: name, changes, why_not, fits, cells (tokens, hours, gpu_hours, cost)
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from launch.planning.automatic import compose
from launch.planning.output import to_json, to_table
from launch.planning.plan import make_plan
from launch.planning.what_if import to_json as what_if_to_json
from launch.planning.what_if import what_if
from launch.run import add_config_dir
from prune_distill.errors import ConfigError


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.plan",
        usage="python -m launch.plan experiment=NAME cluster=NAME [key=value ...] [--config-dir DIR] [--what-if] "
        "[--json]",
        description=(__doc__ or "").partition("\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="config groups and values, as Hydra has them")
    add_config_dir(parser)
    parser.add_argument("--json", action="store_true", help="print the plan as one JSON object")
    parser.add_argument(
        "--what-if", action="store_true", help="also print other lengths, cached logits, FP8, fewer layers"
    )
    args = parser.parse_intermixed_args(arguments)
    try:
        cfg = compose(args.overrides, config_dir=args.config_dir, for_plan=True)
        plan = make_plan(cfg)
        variants = what_if(cfg) if args.what_if else []
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    if args.json:
        content = to_json(plan) | ({"what_if": what_if_to_json(variants)} if args.what_if else {})
        print(json.dumps(content, indent=1))
    else:
        print(to_table(plan, variants))
    return 1 if plan.fits is False else 0


if __name__ == "__main__":
    sys.exit(main())
