"""Chat templates are untrusted programs with limits on time and memory."""

from __future__ import annotations

import hashlib
import json
import resource
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from prune_distill.data import chat, documents
from prune_distill.data.limits import LimitError, Limits
from prune_distill.data.readers import Lines
from prune_distill.data.tokenizer import TokenizerSpec
from prune_distill.errors import InputError
from prune_distill.schema import DocumentFormat, Learn
from tests.helpers.tokenizers import byte_level

SECONDS = 0.3
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
ENDLESS = "{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3
HUGE = "{% set n = namespace(text='abcdefgh') %}{% for _ in range(60) %}{% set n.text = n.text + n.text %}{% endfor %}"
LONG = "{{ messages[0].content * 2000000 }}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return byte_level(tmp_path_factory.mktemp("model"))


def render(folder: Path, template: str, monkeypatch: pytest.MonkeyPatch, learn: Learn = Learn.all) -> documents.Render:
    assert AutoTokenizer  # imported before our loader, which excludes torch
    (folder / "chat_template.jinja").write_text(template)
    monkeypatch.setattr(chat, "CHAT_SECONDS", SECONDS)
    monkeypatch.setattr(chat, "CHAT_BYTES", 2**26)
    return documents.renderer(DocumentFormat.chat, TokenizerSpec(str(folder), None, 2, 400, True), None, learn)


@pytest.mark.parametrize(
    ("template", "limit"),
    [
        (ENDLESS, "takes more than 0.3 s"),
        ("{{ 7777777 ** 777777777 }}", "takes more than 0.3 s"),
        (HUGE, "takes more than 0.0625 GiB of memory"),
        ("{{ 'a' * 10000000000 }}", "takes more than 0.0625 GiB of memory"),
        (LONG, "writes 4,000,000 characters"),
        # Only if there is an answer to learn.
        (
            "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}"
            + ENDLESS
            + "{% endif %}",
            "takes more than 0.3 s",
        ),
    ],
)
def test_an_endless_template_is_one_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch, template: str, limit: str
) -> None:
    before = resource.getrlimit(resource.RLIMIT_AS)
    call = render(folder, template, monkeypatch, Learn.assistant)
    started = time.process_time()
    with pytest.raises(InputError, match=rf"the chat template in {folder} {limit} for one conversation; "):
        call(CHAT, {})
    assert time.process_time() - started < 10
    assert resource.getrlimit(resource.RLIMIT_AS) == before
    assert signal.getitimer(signal.ITIMER_PROF) == (0, 0)


class Records:
    """A source of one file."""

    def __init__(self, *records: Any) -> None:
        self.records = records

    def __iter__(self) -> Iterator[bytes]:
        return iter([json.dumps(record).encode() for record in self.records])

    def where(self) -> str:
        return "chat.jsonl:1"


def test_a_limit_is_not_an_invalid_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(template: str, lines: Lines) -> list[str]:
        source: Any = Records({"messages": CHAT}, {"messages": 3})
        call = render(folder, template, monkeypatch)
        found = documents.documents(source, call, ["messages"], "cluster", lambda _: True, lines, hashlib.sha256())
        return [document.text for document in found]

    with pytest.raises(InputError, match=r"^chat\.jsonl:1: the chat template in "):
        read(ENDLESS, Lines())
    lines = Lines()
    assert read("{{ raise_exception('no') }}", lines) == []
    assert lines.bad == 2
    lines = Lines()
    assert read("{% for m in messages %}[{{ m.content }}]{% endfor %}", lines) == ["[Hi][Yes]"]
    assert (lines.documents, lines.bad) == (1, 1)


def test_long_conversations_do_not_reach_the_limit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit of the output grows with the conversation."""
    call = render(folder, "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}", monkeypatch)
    (rendered,) = call([{"role": "user", "content": "x" * 3_000_000}], {})
    assert len(rendered.text) == 3_000_006


def test_limits_apply_to_each_block() -> None:
    limits = Limits(0.2, 2**26)
    for _ in range(3):
        with limits.applied():
            end = time.process_time() + 0.1
            while time.process_time() < end:
                pass
    with pytest.raises(LimitError, match="memory"), limits.applied():
        bytearray(2**27)
    assert len(bytearray(2**27)) == 2**27
    with pytest.raises(ZeroDivisionError), limits.applied():
        1 / 0  # noqa: B018
