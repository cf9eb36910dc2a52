"""Compare quantization after training with quantization-aware distillation, at the demo's size and equal steps.

The student of a complete demo run is distilled for some more steps: without fake quantization, or with that of a
format (`distill.quantize`). Each result is exported and written by the stage quantize, and the loss is that of the
written model on the whole validation set, nats per token. The seed decides the order of the training documents.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from launch.planning.automatic import compose
from prune_distill.nemo import backend
from prune_distill.schema import RunConfig

backend.activate()

from convert import nemo_to_hf  # noqa: E402
from prune_distill.data.folder import DataFolder  # noqa: E402
from prune_distill.evaluation.heldout import Logits, measure_heldout  # noqa: E402
from prune_distill.nemo import hf_models, nemo_api  # noqa: E402
from prune_distill.pruning import finalists  # noqa: E402
from prune_distill.quantization import reader  # noqa: E402
from recipes import distill, quantize  # noqa: E402

# The format of the fake quantization, and the formats that its student is written in.
ARMS: dict[str | None, tuple[str, ...]] = {None: ("int4", "fp8"), "int4": ("int4",), "fp8": ("fp8",)}
SEEDS = (1, 2, 3)
SETTINGS = (
    # A low rate, because the student is trained already.
    *("distill.lr=3e-4", "distill.min_lr=3e-5", "distill.warmup_steps=5"),
    # The loss is measured afterwards.
    *("distill.val_batches=1", "distill.controls=[]", "evaluate.recovery=false"),
    # AWQ's search uses 512 tokens of them in any case.
    *("quantize.calibration_samples=64", "quantize.calibration_seq_length=256", "quantize.micro_batch_size=8"),
)


@dataclass(frozen=True)
class Demo:
    """A complete run of `experiment=demo`."""

    run_dir: Path

    def stage(self, name: str) -> Path:
        """Return the newest complete folder of a stage."""
        complete = self.run_dir.glob(f"{name}-*/manifest.json")
        return max(complete, key=lambda path: path.stat().st_mtime).parent

    def config(self, steps: int, seed: int, trained: str | None, formats: tuple[str, ...]) -> RunConfig:
        return compose(
            [
                *("experiment=demo", f"run_dir={self.run_dir}", f"seed={seed}", *SETTINGS),
                *(f"distill.{name}={steps}" for name in ("max_steps", "val_every_n_steps", "save_every_n_steps")),
                f"quantize.formats=[{','.join(formats)}]",
                f"distill.quantize={trained or 'null'}",
            ]
        )


def measure(demo: Demo, folder: Path, steps: int) -> Iterator[dict[str, Any]]:
    """Yield the loss of each arm, seed and format."""
    student, teacher = demo.stage("distill") / "nemo", demo.stage("hf_to_nemo") / "nemo"
    nemo_api.restore(teacher)  # creates the process groups
    for trained, formats in ARMS.items():
        for seed in SEEDS:
            out = folder / f"seed{seed}-{trained}"
            out.mkdir(parents=True, exist_ok=True)
            cfg = demo.config(steps, seed, trained, formats)
            distill.run(cfg, distill.Inputs(student, demo.stage("prepare_data"), {}, teacher), out)
            finalists.release()
            for name, loss in losses(demo, cfg, out):
                yield {"seed": seed, "trained": trained, "format": name, "steps": steps, "val_loss": loss}


def losses(demo: Demo, cfg: RunConfig, out: Path) -> Iterator[tuple[str, float]]:
    """Export a distilled student; yield its loss, and that of each quantized model."""
    teacher = demo.stage("demo_model") / "hf"
    nemo_to_hf.run(cfg, nemo_to_hf.Inputs(teacher, {"student": out / "nemo"}), out)
    yield "fp32", heldout(demo, cfg, hf_models.load(out / "student"))
    for quant_format in cfg.quantize.formats:
        cfg.quantize.formats = [quant_format]
        quantize.run(cfg, quantize.Inputs(out / "student", demo.stage("prepare_data")), out)
        yield quant_format.value, heldout(demo, cfg, reader.load(out / f"student_{quant_format.value}"))


def heldout(demo: Demo, cfg: RunConfig, model: Any) -> float:
    data = DataFolder.read(demo.stage("prepare_data"))
    return measure_heldout(Logits(model), None, data, cfg.evaluate)["val_loss"]


def table(results: list[dict[str, Any]]) -> str:
    lines = ["| distillation | written as | val loss: mean (each seed) |", "|---|---|---|"]
    for trained, formats in ARMS.items():
        for name in ("fp32", *formats):
            found = [r["val_loss"] for r in results if (r["trained"], r["format"]) == (trained, name)]
            arm = f"with fake {trained}" if trained else "without"
            lines.append(f"| {arm} | {name} | {mean(found):.4f} ({', '.join(f'{loss:.4f}' for loss in found)}) |")
    return "\n".join(lines)


def main() -> None:
    """By itself: python -m tests.benchmarks.bench_qad DEMO_RUN_DIR FOLDER [STEPS]."""
    demo, folder = Demo(Path(sys.argv[1]).resolve()), Path(sys.argv[2]).resolve()
    steps = int(sys.argv[3]) if len(sys.argv) > 3 else 160
    results = []
    for result in measure(demo, folder, steps):
        print(result, flush=True)
        results.append(result)
        (folder / "qad.json").write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
