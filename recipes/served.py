"""python -m recipes.served RUN_DIR URL [--model NAME] [--seq-length N] [--out FILE]

Measure what a running server of vLLM computes: its model's loss on the held-out documents of a run, and how often its
most probable token is the one of the run's teacher. The server may be in a container or on another machine, and its
model needs the run's tokenizer. The result is not part of the run, because a server does not prove what it serves.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from prune_distill.data.folder import DataFolder
from prune_distill.errors import InputError
from prune_distill.evaluation.engine import score_served
from prune_distill.evaluation.heldout import Logits, measure_served
from prune_distill.evaluation.results import HeldOut
from prune_distill.model.huggingface import local_folder
from prune_distill.nemo import hf_models
from prune_distill.pipeline.artifact import write_json
from prune_distill.pipeline.stage_main import command_line
from prune_distill.serving import server
from recipes.recovery import open_run


def measure(run_dir: Path, url: str, model: str | None, seq_length: int | None) -> HeldOut:
    """Measure a server's model; see `prune_distill.evaluation.results`.

    Args:
        model: its name in requests; None: the first one that the server names.
        seq_length: tokens per sequence; None: as the run's evaluation. The server's context must hold one token more.

    Raises:
        ConfigError: the folder is not a run, or teacher or data do not exist yet.
        InputError: the server cannot be reached or is not vLLM's, or teacher or data are damaged.
    """
    if seq_length is not None and seq_length < 1:
        raise InputError(f"--seq-length={seq_length}: must be above 0")
    url = url.rstrip("/").removesuffix("/v1")
    try:
        served_names = [entry["id"] for entry in server.ask(f"{url}/v1/models")["data"]]
    except (KeyError, TypeError) as error:
        raise InputError(f"{url}/v1/models: the answer names no models; use a server of vLLM") from error
    cfg, stages = open_run(run_dir)
    if seq_length is not None:
        cfg = dataclasses.replace(cfg, evaluate=dataclasses.replace(cfg.evaluate, seq_length=seq_length))
    inputs = stages["evaluate"].inputs
    data = DataFolder.read(inputs["data"])
    served = score_served(url, model or served_names[0], data, cfg)
    teacher = hf_models.load(local_folder(inputs["teacher"], cfg.model.revision, weights=True))
    return measure_served(served, Logits(teacher), data.vocab_size, data, cfg.evaluate)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    parser.add_argument("url", metavar="URL", help="of the server, such as http://127.0.0.1:8000")
    parser.add_argument("--model", help="its name in requests (the server's first)")
    parser.add_argument("--seq-length", type=int, metavar="N", help="tokens per sequence (evaluate.seq_length)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the result as JSON")
    arguments = parser.parse_args()
    with command_line():
        result = measure(arguments.run_dir, arguments.url, arguments.model, arguments.seq_length)
        if arguments.out is not None:
            write_json(arguments.out, result)
        agreement = result["agreement"]["top1"]
        print(f"held-out loss {result['val_loss']:.4f} nats per token, on {result['tokens']:,} tokens")
        print(f"the most probable token is the teacher's for {agreement:.1%} of them")


if __name__ == "__main__":
    main()
