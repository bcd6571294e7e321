"""Tokenised data on disk: found again by what decided it, whole or absent, whoever else builds it at the same time."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from posttrain.disk import flush, remove, writing

FACTS = "counts.json"
ADVICE = "make room there or give another folder (data.cache)"


def cache_root(given: str | None) -> Path:
    """data.cache, else the user's cache folder."""
    if given:
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "posttrain" / "tokens"


def digest(parts: dict[str, Any]) -> str:
    """24 hex digits that change with any of these."""
    return hashlib.blake2b(json.dumps(parts, sort_keys=True, default=str).encode(), digest_size=12).hexdigest()


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Changes with the vocabulary, the merges, the special tokens or the template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    core = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    specials = json.dumps(tokenizer.special_tokens_map, sort_keys=True, default=str)
    return hashlib.blake2b(f"{core}{specials}{tokenizer.chat_template}".encode(), digest_size=12).hexdigest()


def is_built(directory: Path) -> bool:
    return (directory / FACTS).is_file()


def read_facts(directory: Path) -> dict[str, Any]:
    """What `build` was told about the data."""
    facts: dict[str, Any] = json.loads((directory / FACTS).read_text(encoding="utf-8"))
    return facts


def build(directory: Path, fill: Callable[[Path], dict[str, Any]]) -> None:
    """Have `fill` write the data into a scratch folder and tell its facts, then name it `directory`.

    Of two processes that build the same, the first to finish wins and the other's copy, equal to it, is thrown away.
    """
    with writing(directory, ADVICE):
        _sweep(directory)
        scratch = directory.with_name(f"{directory.name}.{socket.gethostname()}.{os.getpid()}.tmp")
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        try:
            facts = fill(scratch)
            (scratch / FACTS).write_text(json.dumps(facts, ensure_ascii=False, indent=1), encoding="utf-8")
            flush(scratch)
            _claim(directory, scratch)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def _claim(directory: Path, scratch: Path) -> None:
    try:
        scratch.rename(directory)
    except OSError:
        if is_built(directory):
            return  # another process was quicker
        remove(directory)  # what somebody left half deleted
        scratch.rename(directory)


def _sweep(directory: Path) -> None:
    """Delete what builds of this data that were killed on this machine left behind."""
    for path in directory.parent.glob(f"{directory.name}.{socket.gethostname()}.*.tmp"):
        process = path.name.split(".")[-2]
        if process.isdigit() and not _is_alive(int(process)):
            with suppress(OSError):
                shutil.rmtree(path)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
