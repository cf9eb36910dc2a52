"""Find credentials in config values, which are rejected, and remove them from messages. No torch.

Config values end up in `resolved.yaml`, logs, reports and model cards, so they must not contain passwords or tokens.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

REMOVED = "[removed]"
_NAMES = r"(?:token|secret|passw(?:or)?d|api_?key|access_?key|private_?key|credentials?)"
# Environment variables whose values are credentials. Short values are ignored: they occur in any text.
_SECRET_VARIABLE = re.compile(rf"(?i){_NAMES}|_KEY$")
_SHORTEST_VALUE = 8
# Tokens with a known prefix: Hugging Face, OpenAI, GitHub, GitLab, AWS, NVIDIA, Slack, W&B, JWT.
_TOKEN = (
    r"(?:hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{16,}|github_pat_\w{16,}|glpat-[\w-]{16,}"
    r"|AKIA[0-9A-Z]{12,}|nvapi-[\w-]{16,}|xox[abp]-[\w-]{10,}|wandb_v1_\w{16,}|local-[0-9a-f]{40}"
    r"|eyJ[\w-]{10,}\.[\w-]+\.[\w-]+)"
)
# Description, pattern, and replacement of each kind of credential.
_SETTINGS: tuple[tuple[str, re.Pattern[str], str], ...] = (
    # A password may contain a slash or an "@"; digits and a slash after the colon are a port.
    (
        "a user and password",
        re.compile(r"(?i)\b([a-z][a-z0-9+.-]*://)[^\s/?#@:\"'<>]*:(?!\d+[/?#])[^\s\"'<>]*@"),
        r"\1",
    ),
    ("a user or token", re.compile(r"(?i)\b((?:https?|hf)://)[^/?#\s@\"'<>]+@"), r"\1"),
    (
        "a secret query parameter",
        re.compile(
            rf"(?i)(://[^\s\"'<>]*?[?&;#](?:[\w.-]*{_NAMES}|[\w.-]*signature|sig|key|pwd|auth)=)[^\s\"'<>&;#\])]+"
        ),
        rf"\1{REMOVED}",
    ),
    # NAME=value, name: value. `tokens`, `tokenizer` and references to variables are not secret.
    (
        "a secret setting",
        re.compile(
            rf"(?i)((?<![a-z]){_NAMES}(?![a-z_])[\"']?\s*[=:]\s*[\"']?)(?!null\b|none\b|\$|\[)[^\s\"',&;\]}}]{{6,}}"
        ),
        rf"\1{REMOVED}",
    ),
)
_TEXT = (
    *((pattern, remaining) for _, pattern, remaining in _SETTINGS),
    (re.compile(r"(?i)\b(bearer|basic)\s+[A-Za-z0-9._~+/=-]{12,}"), rf"\1 {REMOVED}"),
    (re.compile(rf"\b{_TOKEN}"), REMOVED),
)
# Part of a path may start like a token; it is a name.
_LONE_TOKEN = re.compile(rf"(?<![\w/.-]){_TOKEN}(?![\w/.-])")
# A Weights & Biases key looks like a commit hash, so only keys under `wandb` are checked.
_WANDB_KEY = re.compile(r"[0-9a-f]{40}")


def find_credential(key: str, value: str) -> str | None:
    """Return a description of the credential that a config value contains, or None.

    Args:
        key: the dotted config key.
    """
    if _LONE_TOKEN.search(value) or (".wandb." in key and _WANDB_KEY.fullmatch(value)):
        return "an access token"
    return next((kind for kind, pattern, _ in _SETTINGS if pattern.search(value)), None)


def redact(text: str, environment: Mapping[str, str] = os.environ) -> str:
    """Remove credentials from a text: known kinds, and the values of secret environment variables."""
    secrets = {
        value
        for name, value in environment.items()
        if _SECRET_VARIABLE.search(name) and len(value) >= _SHORTEST_VALUE and not value.startswith("/")
    }
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, REMOVED)
    for pattern, remaining in _TEXT:
        text = pattern.sub(remaining, text)
    return text
