"""Real mixed text that a Debian machine with Python carries: English documentation, source code, and translations.

    write_text(folder)  ->  folder/text.jsonl, about 60 MB

Taken in an order that hashes decide, so that the same packages give the same text. Which packages are installed decides
how much there is of each kind; too little is an error, not a smaller benchmark.
"""

from __future__ import annotations

import gettext
import gzip
import hashlib
import json
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

SHORTEST, LONGEST = 200, 60_000
# Of a translated document so many of its characters are no ASCII.
NON_ASCII = 0.1
MEGABYTES = {"english": 24, "code": 18, "translated": 20}


def write_text(folder: Path) -> dict[str, float]:
    """Write `text.jsonl`; return the bytes of text of each kind, and the fraction of translated text."""
    kinds = {"english": _english, "code": _code, "translated": _translated}
    texts: list[str] = []
    sizes: dict[str, float] = {}
    for kind, documents in kinds.items():
        own = sorted({_key(text): text for text in documents()}.items())
        size = 0
        for _, text in own:
            if size >= MEGABYTES[kind] * 1e6:
                break
            texts.append(text)
            size += len(text.encode())
        if size < MEGABYTES[kind] * 0.9e6:
            raise SystemExit(f"this machine has {size / 1e6:.0f} MB of {kind} text, {MEGABYTES[kind]} are needed")
        sizes[kind] = size
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "text.jsonl").open("w") as file:
        for text in sorted(texts, key=_key):
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    return {**sizes, "translated_share": sizes["translated"] / sum(sizes.values())}


def _english() -> Iterator[str]:
    for root in (
        "/usr/share/doc",
        "/usr/share/man/man1",
        "/usr/share/man/man3",
        "/usr/share/man/man8",
        "/usr/share/perl",
    ):
        for path in _files(Path(root)):
            yield from _document(_read(path), non_ascii=False)


def _code() -> Iterator[str]:
    for path in _files(Path(sysconfig.get_paths()["stdlib"])):
        if path.suffix == ".py" and "site-packages" not in path.parts:
            yield from _document(_read(path), non_ascii=False)


def _translated() -> Iterator[str]:
    """Message catalogues and manual pages of other languages."""
    for path in _files(Path("/usr/share/locale")):
        if path.suffix == ".mo":
            yield from _catalogue(path)
    for folder in sorted(Path("/usr/share/man").iterdir()):
        if folder.is_dir() and not folder.name.startswith("man"):
            for path in _files(folder):
                yield from _document(_read(path), non_ascii=True)


def _catalogue(path: Path) -> Iterator[str]:
    try:
        with path.open("rb") as file:
            catalogue = gettext.GNUTranslations(file)._catalog  # type: ignore[attr-defined]
    except Exception:  # gettext raises whatever comes of a catalogue without the usual header
        return
    messages = sorted((str(source), text) for source, text in catalogue.items() if isinstance(text, str))
    document = ""
    for _, text in messages:
        document += text + "\n"
        if len(document) > 4000:
            yield from _document(document, non_ascii=True)
            document = ""
    yield from _document(document, non_ascii=True)


def _document(text: str | None, non_ascii: bool) -> Iterator[str]:
    if text is None or len(text) < SHORTEST:
        return
    text = text[:LONGEST]
    share = sum(not letter.isascii() for letter in text) / len(text)
    if (share >= NON_ASCII) == non_ascii:
        yield text


def _read(path: Path) -> str | None:
    try:
        content = path.read_bytes()
        return (gzip.decompress(content) if path.suffix == ".gz" else content).decode()
    except (OSError, EOFError, UnicodeDecodeError):
        return None


def _files(folder: Path) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder):
        folders.sort()
        yield from (Path(parent, name) for name in sorted(names))


def _key(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
