"""Activation of the CPU or GPU backend, in separate processes because it changes PyTorch and the path."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
import torch

from prune_distill.errors import ConfigError
from prune_distill.nemo import backend, devices

ROOT = Path(backend.__file__).parents[2]
without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")


def _python(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), variables.pop("PYTHONPATH", "")])
    environment = {**os.environ, **variables, "PYTHONPATH": path}
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, env=environment, timeout=300
    )


@without_cuda
def test_activation_on_a_cpu_reaches_nemo_and_child_processes() -> None:
    done = _python("""
import gc, logging, os, subprocess, sys
logging.basicConfig(level=logging.INFO, format="%(message)s")
from prune_distill.nemo import backend, devices
# As upstream's own with a CUDA build of torch and no visible GPU (torch/utils/cpp_extension.py:2714).
from torch.utils import cpp_extension
cpp_extension._jit_compile = lambda *_, **__: [][-1]
chosen = backend.activate()
assert backend.activate() is chosen
from megatron.core.inference import unified_memory
assert not unified_memory.has_unified_memory
assert (chosen.name, chosen.device, chosen.accelerator, chosen.process_group) == ("cpu", "cpu", "cpu", "gloo")
assert chosen.model_config == {"use_cpu_initialization": True, "gradient_accumulation_fusion": False}
assert chosen.peak_memory_bytes() > 2**26
assert "nemo.collections.llm" in sys.modules
assert gc.isenabled() and gc.get_freeze_count() > 100_000

child = [sys.executable, "-c", "import transformer_engine; print(transformer_engine.__version__)"]
assert subprocess.run(child, capture_output=True, text=True, check=True).stdout.strip() == "1.9.0+cpu.standin"

from nemo.lightning import megatron_init
from nemo.lightning.io import pl
from nemo.utils.te_utils import te_version
from megatron.core import tensor_parallel
from megatron.core.utils import is_te_min_version
assert te_version() == (1, 9, 0)
assert is_te_min_version("1.9.0") and not is_te_min_version("1.10.0.dev0")
assert pl._fix_tensors_device({"a": 1}) == {"a": 1}

megatron_init.get_pipeline_model_parallel_rank = lambda: 0
from megatron.core import parallel_state
parallel_state.get_pipeline_model_parallel_rank = lambda: 0
import torch
torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
parallel_state.initialize_model_parallel()
megatron_init._set_random_seed(11)
assert "model-parallel-rng" in tensor_parallel.get_cuda_rng_tracker().get_states()
assert torch.equal(torch.rand(2), torch.rand(2, generator=torch.Generator().manual_seed(11)))
print("DONE")
""")
    assert done.stdout.strip().endswith("DONE"), done.stderr[-3000:]
    output = [line for line in done.stderr.splitlines() if line.startswith("backend: ")]
    assert output == ["backend: cpu (no CUDA device found; Transformer Engine stand-in 1.9.0+cpu.standin)"]


@pytest.mark.parametrize("early", ["megatron.core", "nemo"])
def test_activation_after_the_libraries_is_an_error(early: str) -> None:
    done = _python(f"""
import sys, types
sys.modules["{early}"] = types.ModuleType("{early}")
from prune_distill.nemo import backend, devices
backend.activate()
""")
    assert done.returncode == 1
    assert f"RuntimeError: {early} was imported before backend.activate(); activate first" in done.stderr


@without_cuda
def test_a_real_transformer_engine_without_cuda_is_an_error(tmp_path: Path) -> None:
    info = tmp_path / "transformer_engine_cu12-2.4.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: transformer-engine-cu12\nVersion: 2.4.0\n")
    done = _python("from prune_distill.nemo import backend; backend.activate()", PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    assert "ConfigError" in done.stderr
    assert f"transformer-engine-cu12 2.4.0 ({tmp_path})" in done.stderr


@without_cuda
def test_the_stand_in_rejects_machines_with_cuda() -> None:
    done = _python(
        """
import torch
torch.cuda.is_available, torch.cuda.get_device_name = lambda: True, lambda: "H100"
import transformer_engine
""",
        PYTHONPATH=str(ROOT / "prune_distill/nemo/cpu/site"),
    )
    assert done.returncode == 1
    assert "ImportError: the CPU stand-in" in done.stderr
    assert "was imported although CUDA is available (H100)" in done.stderr


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "H100")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.mark.parametrize("origin", [None, str(ROOT / "prune_distill/nemo/cpu/site/transformer_engine/__init__.py")])
def test_cuda_without_transformer_engine_is_an_error(
    origin: str | None, two_gpus: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = origin and ModuleSpec("transformer_engine", None, origin=origin)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: spec)
    with pytest.raises(ConfigError, match="H100 x 2.*CUDA_VISIBLE_DEVICES="):
        backend._activate_gpu()


def test_with_cuda_and_transformer_engine_nothing_is_changed(two_gpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = ModuleSpec("transformer_engine", None, origin="/usr/lib/python3/transformer_engine/__init__.py")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: spec)
    path = list(sys.path)
    chosen = backend._activate_gpu()
    assert (chosen.name, chosen.device, chosen.accelerator, chosen.process_group) == ("gpu", "cuda", "gpu", "nccl")
    assert chosen.model_config == {}
    assert sys.path == path
    assert devices.torch_device() == "cuda"


def test_the_build_lock_of_a_killed_process_is_released(tmp_path: Path) -> None:
    """Torch's lock is the existence of a file, so all later processes would wait forever."""
    script = (
        "import sys, time; from prune_distill.nemo.backend import FlockBaton\n"
        "baton = FlockBaton(sys.argv[1]); assert baton.try_acquire(); print(flush=True); time.sleep(60)"
    )
    path = str(tmp_path / "lock")
    with subprocess.Popen([sys.executable, "-c", script, path], stdout=subprocess.PIPE, cwd=ROOT) as builder:
        assert builder.stdout is not None
        builder.stdout.readline()
        assert not backend.FlockBaton(path).try_acquire()
        builder.kill()
    waiting = backend.FlockBaton(path)
    waiting.wait()
    first, second = backend.FlockBaton(path), backend.FlockBaton(path)
    assert first.try_acquire()
    assert not second.try_acquire()
    first.release()
    assert second.try_acquire()
