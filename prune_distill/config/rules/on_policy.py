"""Rules of the group `distill.on_policy`."""

from __future__ import annotations

from collections.abc import Iterator
from urllib.parse import urlsplit

from prune_distill.config.data_files import HUB, document_files, find_existing, is_on_hub, unreadable
from prune_distill.config.rule import Finding, rule
from prune_distill.config.rules.evaluation import runs_in_container
from prune_distill.config.values import require, serve_python
from prune_distill.schema import GenerationEngine, Loss, OnPolicy, RunConfig

KEY = "distill.on_policy"
ENGINE, URL, PROMPTS = (f"{KEY}.{name}" for name in ("engine", "server_url", "prompts"))


@rule("on_policy.loss", f"{KEY}?", "distill.loss")
def loss(cfg: RunConfig) -> Iterator[Finding]:
    if cfg.distill.on_policy is not None and cfg.distill.loss is Loss.ce:
        yield Finding("distill.loss", f"completions are learned from a teacher; set distill.loss=kd, or {KEY}=null")


@rule(
    "on_policy.length",
    *(f"{KEY}.{name}" for name in ("prompt_tokens", "max_new_tokens", "prompts")),
    "distill.seq_length",
)
def length(cfg: RunConfig) -> Iterator[Finding]:
    """A sequence holds a whole prompt, its completion and an end-of-document token."""
    on_policy, limit = _on_policy(cfg), cfg.distill.seq_length
    # The prompts of files have their own lengths: those that are too long are left out.
    prompt = 1 if on_policy.prompts is not None else on_policy.prompt_tokens
    if prompt + on_policy.max_new_tokens + 1 > limit:
        yield Finding(
            f"{KEY}.max_new_tokens",
            f"with prompts of {prompt} tokens ({KEY}.prompt_tokens), completions do not fit distill.seq_length={limit};"
            f" set the two to at most {limit - 1} in sum",
        )


@rule("on_policy.learning_rate", *(f"{KEY}.{name}" for name in ("steps", "lr", "min_lr", "warmup_steps")))
def learning_rate(cfg: RunConfig) -> Iterator[Finding]:
    on_policy = _on_policy(cfg)
    if on_policy.min_lr > on_policy.lr:
        yield Finding(f"{KEY}.min_lr", f"above {KEY}.lr={on_policy.lr}; set {KEY}.min_lr to at most {on_policy.lr}")
    if on_policy.warmup_steps >= on_policy.steps:
        fix = f"set {KEY}.warmup_steps to less, such as {on_policy.steps // 20}"
        yield Finding(f"{KEY}.warmup_steps", f"too long for {KEY}.steps={on_policy.steps}; {fix}")


@rule("on_policy.server_url", ENGINE, URL)
def server_url(cfg: RunConfig) -> Iterator[Finding]:
    on_policy = _on_policy(cfg)
    needed = on_policy.engine is GenerationEngine.server
    if needed and not _is_url(on_policy.server_url):
        yield Finding(URL, f"{ENGINE}=server needs its base URL; set {URL}=http://HOST:PORT/v1")
    if not needed and on_policy.server_url is not None:
        yield Finding(URL, f"not used with {ENGINE}={on_policy.engine.value}; set {ENGINE}=server, or {URL}=null")


@rule("on_policy.serve_python", ENGINE, "benchmark.serve_python", "cluster.slurm?.container_image", on_machine=True)
def serve_environment(cfg: RunConfig) -> Iterator[Finding]:
    wanted = _on_policy(cfg).engine is GenerationEngine.vllm and not runs_in_container(cfg)
    python = serve_python(cfg.benchmark)
    if wanted and not python.exists():
        yield Finding(
            ENGINE,
            f"needs the environment with vLLM, and {python} (benchmark.serve_python) does not exist; run make"
            f" serve-env, or set {ENGINE}=transformers",
        )


@rule("on_policy.prompts", PROMPTS)
def prompts(cfg: RunConfig) -> Iterator[Finding]:
    named = _on_policy(cfg).prompts
    if named == []:
        yield Finding(PROMPTS, f"contains no file; set {PROMPTS}=[FILE.jsonl] or {PROMPTS}=null")
    for pattern in named or ():
        if is_on_hub(pattern) and not HUB.fullmatch(pattern):
            fix = f"set {PROMPTS}=[hf://datasets/OWNER/NAME[@REVISION]/GLOB]"
            yield Finding(PROMPTS, f"{pattern!r} names no files of a dataset on the Hub; {fix}")


@rule("on_policy.readable", PROMPTS, on_machine=True)
def readable(cfg: RunConfig) -> Iterator[Finding]:
    """Report what local files reveal before they are read: one fault, as files of prompts are alike."""
    for pattern in _on_policy(cfg).prompts or ():
        found = [] if is_on_hub(pattern) else find_existing(pattern)
        files = document_files(found)
        if not is_on_hub(pattern) and not files:
            problem = "contains no .jsonl or .parquet file" if found else "not found"
            yield Finding(PROMPTS, f"{pattern} {problem}; set {PROMPTS}=[FILE.jsonl] to files that exist")
            return
        faults = [f"{file} {reason}" for file in files if (reason := unreadable(file))]
        if faults:
            yield Finding(PROMPTS, faults[0])
            return


def _on_policy(cfg: RunConfig) -> OnPolicy:
    return require(cfg.distill.on_policy)


def _is_url(text: str | None) -> bool:
    parts = urlsplit(text or "")
    return parts.scheme in ("http", "https") and bool(parts.hostname)
