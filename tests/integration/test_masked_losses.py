"""Losses and gradients of masked data are the same in every layout, and with any micro batch size."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest

from conf.load import compose, save_resolved
from convert.stored import blocks
from convert.torch_dist import TorchDistReader
from launch import local
from recipes.artifact import locate
from recipes.runtime.data.folder import DataFolder
from recipes.runtime.data.shards import SplitWriter, documents_of
from tests.helpers import tiny, tolerance
from tests.helpers.masked_layouts import KINDS, LAYOUTS

STEPS = 3
# All that the loss can mix. The checkpoint of step 2 has the optimizer's moments.
SETTINGS = (
    *(f"distill.max_steps={STEPS}", "distill.save_every_n_steps=2", "distill.val_every_n_steps=1"),
    *("distill.kd.temperature=2", "distill.kd.kd_weight=0.7", "distill.kd.lm_weight=0.3"),
    *("distill.kd.intermediate_pairs=[{student:2,teacher:4}]", "distill.kd.intermediate_weight=0.5"),
)
REFERENCE = "one_by_one"
# Of the largest first moment: sums in fp32 in another order.
SAME = 1e-5


@pytest.fixture(scope="module")
def trained(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that holds a training of each kind and layout."""
    run_dir = tiny.copy_run(finished, tmp_path_factory.mktemp("masked") / "run")
    for ranks in LAYOUTS:
        cfg = compose(tiny.overrides(run_dir, *tiny.DEPTH, *SETTINGS, f"cluster.devices_per_node={ranks}"))
        save_resolved(cfg, run_dir / "resolved.yaml")
        stage = locate(cfg)["distill"]
        if ranks == 1:
            write_masks(stage.inputs["data"])
        command = local.command(stage, run_dir / "resolved.yaml")
        command = ["tests.helpers.masked_layouts" if word == "recipes.distill" else word for word in command]
        done = subprocess.run(command, env=tiny.environment(), capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout + done.stderr
        (stage.folder / "manifest.json").unlink()
    return stage.folder


def write_masks(folder: Path) -> None:
    """Masks next to a data folder's tokens, as `data.mask_prompts` leaves them: stretches of 100 tokens of which
    nothing, a tenth or all is learned, so that some sequences of 128 have next to nothing to learn."""
    random = np.random.default_rng(0)
    data = DataFolder.read(folder)
    for prefix in (*(folder / part["prefix"] for part in data.train), folder / "validation"):
        writer = SplitWriter(Path(f"{prefix}_mask"), np.dtype(np.uint8), 2)
        for document in documents_of(prefix):
            shares = np.repeat(random.choice([0.0, 0.1, 1.0], len(document) // 100 + 1), 100)[: len(document)]
            writer.add([(random.random(len(document)) < shares).astype(np.uint8)], (0, 0, 0))
        writer.finish()


@pytest.mark.parametrize("layout", [name for layouts in LAYOUTS.values() for name in layouts if name != REFERENCE])
def test_a_layout_changes_neither_losses_nor_gradients(trained: Path, layout: str) -> None:
    assert_same(trained / "distilled" / layout, trained / "distilled" / REFERENCE)


@pytest.mark.parametrize("kind", KINDS)
def test_a_micro_batch_size_changes_neither(trained: Path, kind: str) -> None:
    assert_same(trained / kind / "four_at_once", trained / kind / REFERENCE)


def assert_same(folder: Path, reference: Path) -> None:
    assert tiny.losses(folder, STEPS) == pytest.approx(tiny.losses(reference, STEPS), rel=0, abs=tolerance.LOSS)
    assert tiny.validations(folder) == pytest.approx(tiny.validations(reference), rel=0, abs=tolerance.LOSS)
    found, expected = moments(folder), moments(reference)
    assert found.keys() == expected.keys()
    largest = max(float(np.abs(values).max()) for values in expected.values())
    apart = {key: float(np.abs(found[key] - values).max()) / largest for key, values in expected.items()}
    assert max(apart.values()) < SAME, apart


def moments(folder: Path) -> dict[str, np.ndarray]:
    """Adam's first moments after two steps, means of the clipped gradients."""
    reader = TorchDistReader(folder / "checkpoints" / "step=2" / "weights")
    keys = [key for key in reader.tensors if "exp_avg." in key]
    assert keys, list(reader.tensors)
    return {
        key: np.frombuffer(b"".join(bytes(block) for block in blocks(reader.tensor(key))), np.float32) for key in keys
    }
