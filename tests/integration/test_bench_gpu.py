"""The GPU benchmark rehearsed on a CPU at toy sizes, and the helper of a test in tests/gpu."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.helpers import tiny, tolerance
from tests.helpers.bf16_logits import compare_logits


def test_some_parts_of_the_benchmark_at_toy_size(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    command = [sys.executable, "-m", "tests.benchmarks.bench_gpu", "--toy", "--parts", "loss,convert"]
    command += ["--seconds", "600", "--out", str(out), "--work", str(tmp_path / "work")]
    done = subprocess.run(command, env=tiny.environment(), capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    result = json.loads(out.read_text())
    assert result["toy"] is True
    assert {"card", "versions"} <= set(result["machine"])
    assert result["machine"]["versions"]["torch"]
    assert list(result["parts"]) == ["loss", "convert"]
    for part in result["parts"].values():
        assert part["fault"] is None
        assert part["figures"]
        for figure in part["figures"]:
            assert set(figure) in ({"name", "value", "unit", "how"}, {"name", "value", "unit", "why"})
    measured = {
        figure["name"] for part in result["parts"].values() for figure in part["figures"] if figure["value"] is not None
    }
    for case in ("forward_kl", "forward_kl_ce", "jsd_ce"):
        for way in ("chunked_16", "chunked_64", "plain", "torch.compile"):
            assert {f"loss/{case}/{way}/{figure}" for figure in ("time", "peak_memory")} <= measured
        assert {f"loss/{case}/roofline", f"loss/{case}/chunked/error_of_weight"} <= measured
    assert {"convert/import/speed", "convert/export/speed", "convert/cp_hf/speed"} <= measured
    assert "loss/forward_kl/plain/time" in done.stdout


def test_logits_of_megatrons_layers_match_transformers_in_bf16(tmp_path: Path) -> None:
    """What tests/gpu/test_transformer_engine.py runs on CUDA."""
    found = compare_logits(tmp_path)
    assert found["layers"]
    assert 0 < found["megatron"] < tolerance.BF16_LOGITS * found["transformers"], found
