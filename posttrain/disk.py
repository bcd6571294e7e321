"""Writing so that a file or a directory is whole or absent, and so that a disk that refuses is told in a line."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from posttrain.errors import OutputError

GO_ON = "make room or give another place (run.dir, run.root); the same command goes on from the last checkpoint"
TORCH_WRITER = ("PytorchStreamWriter", "unexpected pos", "open file failed", "write file failed")
"""What torch.save's own writer says, in a RuntimeError, when the disk refuses."""


@contextmanager
def writing(path: Path, advice: str = GO_ON) -> Iterator[None]:
    """Whatever the disk refuses within this block becomes an OutputError that names the path and the way out."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(said in str(error) for said in TORCH_WRITER):
            raise
        raise OutputError(f"cannot write {path}: {_reason(error, path)}; {advice}") from error


def write_text(path: Path, text: str) -> None:
    """Replace the file at once: readers see the old one or the new one."""
    scratch = path.with_name(f".{path.name}.tmp")
    try:
        with scratch.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    except OSError:
        with suppress(OSError):
            scratch.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Replace the file at once by this value."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, default=str) + "\n")


@contextmanager
def whole_directory(final: Path, scratch: Path) -> Iterator[Path]:
    """Fill `scratch` in this block; it then takes the name `final`, in place of what was there. A failure leaves neither."""
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        yield scratch
        _open_files(scratch)
        flush(scratch)
        remove(final)
        scratch.rename(final)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    _flush_directory(final.parent)


def remove(path: Path) -> None:
    """Delete a directory so that at no moment half of it bears its name."""
    if path.exists():
        trash = path.with_name(f".{path.name}.deleted")
        shutil.rmtree(trash, ignore_errors=True)
        path.rename(trash)
        shutil.rmtree(trash)


def flush(directory: Path) -> None:
    """Push every file below to the disk before a rename makes them count."""
    for path in directory.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    _flush_directory(directory)


def check_writable(path: Path) -> None:
    """OutputError where this directory can neither be written nor be made; makes nothing."""
    existing = next(p for p in (path, *path.absolute().parents) if os.path.lexists(p))
    if not existing.is_dir():
        raise OutputError(f"cannot write {path}: {existing} is a file, no directory; give another run.dir or run.root")
    if not os.access(existing, os.W_OK | os.X_OK):
        read_only = os.statvfs(existing).f_flag & os.ST_RDONLY
        reason = "is on a read-only file system" if read_only else "may not be written (ls -ld shows its permissions)"
        raise OutputError(f"cannot write {path}: {existing} {reason}; give another run.dir or run.root")


def _reason(error: Exception, path: Path) -> str:
    """The system's words; torch's writer keeps them to itself, so there the free space is looked up."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    if isinstance(error, SafetensorError):
        return str(error)
    existing = next(p for p in (path, *path.absolute().parents) if p.exists())
    free_bytes = shutil.disk_usage(existing).free
    return f"the disk refuses it ({free_bytes / 2**20:,.1f} MiB are free there)"


def _open_files(directory: Path) -> None:
    """Files as the umask wants them: safetensors writes its own readable to their owner alone."""
    for path in directory.rglob("*"):
        if path.is_file():
            path.chmod(path.stat().st_mode | path.parent.stat().st_mode & 0o666)


def _flush_directory(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
