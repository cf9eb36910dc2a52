"""vLLM's server, with the API of OpenAI."""

from __future__ import annotations

import contextlib
import json
import math
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from prune_distill.errors import InputError
from prune_distill.model.huggingface import link_compatible_folder
from prune_distill.serving import processes
from prune_distill.units import GIB

# Not the command `vllm serve`, which does not find its version in the build for CPUs.
MODULE = "vllm.entrypoints.openai.api_server"
# GiB of the KV cache on a CPU, where vLLM would take nearly all memory of the machine; GPUs do not use it.
KV_CACHE = "VLLM_CPU_KVCACHE_SPACE"
LOCAL = "127.0.0.1"
MODEL = "model"  # the name under which a stage's server serves its model
SECONDS_TO_START, SECONDS_TO_ANSWER = 900, 120
SECONDS_BETWEEN_LOOKS = 0.5
# Only warnings and errors, as the stages print them.
_QUIET = ("--uvicorn-log-level", "warning", "--disable-uvicorn-access-log")
# Servers are near; a proxy would not reach those on this machine.
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class RequestError(InputError):
    """A server refused a request, or could not be reached."""


def start_server(
    python: Path,
    folder: Path,
    name: str,
    host: str,
    port: int,
    options: Sequence[str],
    variables: Mapping[str, str],
    **pipes: Any,
) -> subprocess.Popen[Any]:
    """Start a server for one model. It is ready once `wait_until_ready` returns.

    Args:
        folder: the model, as `link_compatible_folder` yields it.
        name: the model's name in requests.
        options: further options of vLLM.
        variables, pipes: see `processes.start`.

    Raises:
        InputError: there is no such Python.
    """
    program = ["-m", MODULE, "--model", str(folder), *server_options(name, host, port), *options]
    return processes.start(python, program, dict(variables), **pipes)


def server_options(name: str, host: str, port: int) -> list[str]:
    return ["--served-model-name", name, "--host", host, "--port", str(port)]


def default_variables(kv_cache_bytes: int) -> dict[str, str]:
    """Return environment variables of vLLM in a stage: the memory of its KV cache on a CPU, and only warnings."""
    return {KV_CACHE: str(max(1, math.ceil(kv_cache_bytes / GIB))), "VLLM_LOGGING_LEVEL": "WARNING"}


@contextlib.contextmanager
def serve(
    folder: Path, python: Path, options: Sequence[str], kv_cache_bytes: int, variables: Mapping[str, str]
) -> Iterator[str]:
    """Serve a model, as `MODEL`, during the block, and yield the server's URL. Only this machine can reach it.

    Args:
        kv_cache_bytes: memory of the KV cache on CPUs.

    Raises:
        InputError: there is no such Python, or vLLM cannot serve the model; its output says why.
    """
    variables = {**default_variables(kv_cache_bytes), **variables}
    with link_compatible_folder(folder) as links:
        port = find_free_port()
        process = start_server(python, links, MODEL, LOCAL, port, [*_QUIET, *options], variables, stdout=sys.stderr)
        try:
            wait_until_ready(process, LOCAL, port, f"{folder}: ")
            yield f"http://{LOCAL}:{port}"
        finally:
            processes.end(process)


def find_free_port() -> int:
    with socket.socket() as attempt:
        attempt.bind((LOCAL, 0))
        return int(attempt.getsockname()[1])


def wait_until_ready(process: subprocess.Popen[Any], host: str, port: int, what: str = "") -> None:
    """Wait until a server answers.

    Args:
        what: the beginning of error messages.

    Raises:
        InputError: it ended, or takes too long.
    """
    until = time.monotonic() + SECONDS_TO_START
    while time.monotonic() < until:
        if process.poll() is not None:
            status = process.returncode
            raise InputError(f"{what}vLLM ended with status {status} before it was ready; its messages are above")
        try:
            with _DIRECT.open(f"http://{host}:{port}/health", timeout=SECONDS_TO_ANSWER):
                return
        except OSError:  # URLError is one
            time.sleep(SECONDS_BETWEEN_LOOKS)
    raise InputError(f"{what}vLLM was not ready after {SECONDS_TO_START} s; its messages are above")


def ask(
    url: str,
    content: Mapping[str, Any] | None = None,
    seconds: float = SECONDS_TO_ANSWER,
    *,
    headers: Mapping[str, str] | None = None,
    opener: urllib.request.OpenerDirector = _DIRECT,
) -> dict[str, Any]:
    """Return a server's answer to a GET request, or to a POST request with JSON content.

    Args:
        headers: further ones.
        opener: sends the request; by default not through a proxy.

    Raises:
        RequestError: it cannot be reached, or its answer is an error or not a JSON object.
    """
    data = None if content is None else json.dumps(content).encode()
    try:
        request = urllib.request.Request(url, data, {"Content-Type": "application/json", **(headers or {})})
        with opener.open(request, timeout=seconds) as response:
            answer = json.load(response)
    except urllib.error.HTTPError as error:
        raise RequestError(f"{url}: {error}: {error.read().decode(errors='replace')[:500]}") from error
    except (OSError, ValueError) as error:
        raise RequestError(f"{url}: {error}") from error
    if not isinstance(answer, dict):
        raise RequestError(f"{url}: the answer is not a JSON object")
    return answer
