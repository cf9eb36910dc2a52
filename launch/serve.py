"""python -m launch.serve RUN_DIR [--model NAME] [--port PORT] [--print] [-- OPTIONS OF VLLM]

Serve a model of a run with vLLM, through the API of OpenAI: the student, the student in a quantized format
(student_fp8), a control, or the teacher. vLLM runs in its own environment (`make serve-env`). When it is ready, one
request checks it, and the command for another is printed. It ends with Ctrl-C. Only this machine can reach it, unless
--host says otherwise.
"""

from __future__ import annotations

import argparse
import json
import shlex
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launch.verification import check_sizes
from prune_distill.config.load import load_resolved
from prune_distill.config.values import serve_python
from prune_distill.errors import ConfigError, InputError
from prune_distill.model.huggingface import link_compatible_folder
from prune_distill.pipeline.artifact import Located, find_runs, locate
from prune_distill.pipeline.names import RESOLVED
from prune_distill.pipeline.processes import require_python
from prune_distill.serving import processes, server

# vLLM's own image for GPUs, of the version in requirements/serve-gpu.in.
IMAGE = "vllm/vllm-openai:v0.32.0"
# GiB on a CPU.
CPU_KV_CACHE = "4"
PROMPT, NEW_TOKENS = "The", 8


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.serve",
        usage="%(prog)s RUN_DIR [--model NAME] [--host HOST] [--port PORT] [--print] [-- OPTIONS OF VLLM]",
        description=(__doc__ or "").partition("\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="the run_dir of launch.run")
    parser.add_argument("--model", default="student", help="student, student_FORMAT, a control, or teacher (student)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="(8000)")
    parser.add_argument("--print", action="store_true", help="print a command that serves it in vLLM's image, and stop")
    words = list(sys.argv[1:] if arguments is None else arguments)
    end = words.index("--") if "--" in words else len(words)
    args, options = parser.parse_args(words[:end]), words[end + 1 :]
    try:
        cfg = load_resolved(_run(args.run_dir) / RESOLVED)
        folder = find_model(locate(cfg), args.model)
        if args.print:
            print(shlex.join(container_command(folder, args.model, args.port, options)))
            return 0
        python = serve_python(cfg.benchmark)
        require_python(python)
        require_free(args.host, args.port)
        with link_compatible_folder(folder) as links:
            return serve(python, links, args.model, args.host, args.port, options)
    except (ConfigError, InputError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _run(folder: Path) -> Path:
    runs = find_runs(folder)
    if runs != [folder]:
        raise InputError(f"RUN_DIR={folder}: a sweep; give one of its runs, such as {runs[0]}")
    return folder


def find_model(located: Mapping[str, Located], name: str) -> Path:
    """Find the Hugging Face folder of a model that the run's stages evaluate.

    Raises:
        InputError: there is no such model, or its stage is not complete or is damaged.
    """
    models = {
        key: path
        for stage in located.values()
        if stage.stage.module == "recipes.evaluate"
        for key, path in stage.inputs.items()
        if key not in ("data", "checkpoints", "task")
    }
    if name not in models:
        raise InputError(f"--model={name}: not a model of this run; take one of {', '.join(models)}")
    folder = Path(models[name])
    for stage in located.values():
        if folder.is_relative_to(stage.folder):
            damage = check_sizes(stage) if stage.complete else f"stage {stage.stage.name} is not complete"
            if damage is not None:
                raise InputError(f"--model={name}: {damage}; run launch.run again")
    if not (folder / "config.json").is_file():
        raise InputError(f"--model={name}: {folder} is not a folder on this machine; download the model first")
    return folder


def require_free(host: str, port: int) -> None:
    """Raises: InputError, if another process listens there, or the address is not this machine's."""
    with socket.socket() as attempt:
        attempt.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # vLLM sets it too
        try:
            attempt.bind((host, port))
        except (OSError, OverflowError) as error:
            raise InputError(f"--port={port}: cannot listen on {host}:{port} ({error}); set another --port") from error


def serve(python: Path, folder: Path, name: str, host: str, port: int, options: Sequence[str]) -> int:
    """Run vLLM until it ends or is interrupted. Returns its exit status, or 0 after Ctrl-C."""
    process = server.start_server(python, folder, name, host, port, options, {server.KV_CACHE: CPU_KV_CACHE})
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        server.wait_until_ready(process, host, port)
        print(_check(host, port, name, _has_chat_template(folder)), flush=True)
        return process.wait()
    except KeyboardInterrupt:
        return 0
    finally:
        processes.end(process)


def container_command(folder: Path, name: str, port: int, options: Sequence[str]) -> list[str]:
    """Return the `docker run` command that serves a folder with vLLM's image, whose entry point is `vllm serve`, and
    that this machine can reach."""
    path = str(folder.resolve())
    words = ["docker", "run", "--rm", "--gpus", "all", "--ipc=host", "--publish", f"127.0.0.1:{port}:{port}"]
    words += ["--volume", f"{path}:{path}:ro", IMAGE, path]
    return [*words, *server.server_options(name, "0.0.0.0", port), *options]


def _check(host: str, port: int, name: str, chat: bool) -> str:
    """Send one request, and describe its answer and how to send another: as a chat where the model has a template."""
    prompt: dict[str, Any] = {"messages": [{"role": "user", "content": PROMPT}]} if chat else {"prompt": PROMPT}
    url = f"http://{host}:{port}/v1/{'chat/' if chat else ''}completions"
    content = {"model": name, **prompt, "max_tokens": NEW_TOKENS, "temperature": 0}
    started = time.monotonic()
    try:
        answer = server.ask(url, content)
    except server.RequestError as error:
        raise InputError(f"vLLM is up, but does not answer a request: {error}") from error
    seconds = time.monotonic() - started
    choice, tokens = answer["choices"][0], answer["usage"]["completion_tokens"]
    text = choice["message"]["content"] if chat else choice["text"]
    curl = ["curl", url, "-H", "Content-Type: application/json", "-d", json.dumps({**content, "max_tokens": 64})]
    return "\n".join(
        [
            f"{name} is served at http://{host}:{port}/v1 (Ctrl-C ends it)",
            f"checked: {PROMPT!r} was answered with {text!r}, {tokens} tokens in {seconds:.2f} s",
            shlex.join(curl),
        ]
    )


def _has_chat_template(folder: Path) -> bool:
    settings = folder / "tokenizer_config.json"
    return (folder / "chat_template.jinja").is_file() or (
        settings.is_file() and bool(json.loads(settings.read_text()).get("chat_template"))
    )


if __name__ == "__main__":
    sys.exit(main())
