"""English text that comes with CPython: the topics of the language reference and the docstrings of the library.

The sources are parsed, not run. About 1,000 documents and 2.5 MB, which varies slightly between Python releases.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import os
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from pydoc_data import topics

# Approximate number of characters per document. A docstring is never split.
DOCUMENT_CHARACTERS = 4000
SHORTEST_DOCUMENT = 40
SKIPPED_FOLDERS = {"site-packages", "__pycache__", "test", "tests", "idle_test"}


def documents() -> tuple[list[str], list[str]]:
    """Return the corpus in a fixed random order: training documents, and one in twenty for validation."""
    texts = list(_deduplicate(_all_documents()))
    random.Random(0).shuffle(texts)
    held_out = max(1, len(texts) // 20)
    return texts[held_out:], texts[:held_out]


def _all_documents() -> Iterator[str]:
    for _, topic in sorted(topics.topics.items()):
        yield topic
    seen: set[bytes] = set()
    for path in _modules():
        yield from _join(_docstrings(path, seen))


def _modules() -> Iterator[Path]:
    for folder, subfolders, files in os.walk(sysconfig.get_paths()["stdlib"]):
        subfolders[:] = sorted(set(subfolders) - SKIPPED_FOLDERS)
        yield from (Path(folder, name) for name in sorted(files) if name.endswith(".py") and name != "topics.py")


def _docstrings(path: Path, seen: set[bytes]) -> Iterator[str]:
    """Yield the docstrings of a module, its classes and functions, each below its signature, without duplicates."""
    try:
        module = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError, ValueError):  # the library contains a few invalid files on purpose
        return
    docstring = ast.get_docstring(module)
    if docstring:
        yield docstring
    yield from _members(module, "", seen)


def _members(
    parent: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, prefix: str, seen: set[bytes]
) -> Iterator[str]:
    for node in parent.body:
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            continue
        docstring = ast.get_docstring(node)
        if docstring and _is_new(docstring, seen):
            name = f"{prefix}{node.name}"
            signature = f"class {name}" if isinstance(node, ast.ClassDef) else f"{name}({ast.unparse(node.args)})"
            body = "\n".join(f"   {line}" if line else "" for line in docstring.splitlines())
            yield f"{signature}\n\n{body}"
        yield from _members(node, f"{prefix}{node.name}." if isinstance(node, ast.ClassDef) else prefix, seen)


def _join(parts: Iterator[str]) -> Iterator[str]:
    document = ""
    for part in parts:
        if document and len(document) + len(part) > DOCUMENT_CHARACTERS:
            yield document
            document = ""
        document = f"{document}\n\n{part}" if document else part
    yield document


def _deduplicate(texts: Iterator[str]) -> Iterator[str]:
    seen: set[bytes] = set()
    for text in texts:
        cleaned = inspect.cleandoc(text).strip()
        if len(cleaned) >= SHORTEST_DOCUMENT and _is_new(cleaned, seen):
            yield cleaned


def _is_new(text: str, seen: set[bytes]) -> bool:
    digest = hashlib.sha256(" ".join(text.split()).encode()).digest()
    if digest in seen:
        return False
    seen.add(digest)
    return True
