"""UTF-8 text files, plain or gzipped: opened, cut into documents or blocks, and the place named where they are not."""

from __future__ import annotations

import codecs
import gzip
import io
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO, TextIO, cast

from posttrain.errors import DataError

READ_CHARS = 1 << 20


def open_bytes(path: str) -> BinaryIO:
    """The file's bytes, unzipped if its name ends in .gz."""
    return cast(BinaryIO, gzip.open(path, "rb")) if path.endswith(".gz") else open(path, "rb")


def open_text(path: str, newline: str | None = None) -> TextIO:
    """The file as UTF-8 text without its byte order mark; newline as in `open` (None reads CRLF as a newline)."""
    return io.TextIOWrapper(open_bytes(path), encoding="utf-8-sig", newline=newline)


@contextmanager
def reading(path: str) -> Iterator[None]:
    """Turn what can go wrong while a file is read into a DataError that names the file and the way out."""
    try:
        yield
    except UnicodeDecodeError:
        raise _not_utf8(path) from None
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        advice = "is it whole (gzip -t)?" if path.endswith(".gz") else "check its permissions (ls -l) and the disk"
        raise DataError(f"{path}: cannot be read: {reason}; {advice}") from error


def _not_utf8(path: str) -> DataError:
    """Decode again in pieces: the reader that failed knows the position in its own buffer only, not in the file."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    start, line, mark = 0, 1, b""
    with open_bytes(path) as file:
        while True:
            piece = file.read(READ_CHARS)
            mark = mark or piece[:2]
            held = len(decoder.getstate()[0])  # bytes of an unfinished character, kept from the piece before
            try:
                decoder.decode(piece, final=not piece)
            except UnicodeDecodeError as error:
                position, byte = start - held + error.start, error.object[error.start]
                line += error.object[: error.start].count(b"\n")
                break
            assert piece, "the first reading failed, so this one must"
            start, line = start + len(piece), line + piece.count(b"\n")
    encoding = "UTF-16" if mark in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "ISO-8859-1"
    guess = "" if encoding == "UTF-16" else ", if that is its encoding"
    return DataError(
        f"{path}: not UTF-8: byte 0x{byte:02x} at position {position} (line {line}); "
        f"convert it with `iconv -f {encoding} -t UTF-8 {path} > utf8-copy`{guess}"
    )


def text_blocks(path: str, block_chars: int = 1_000_000) -> Iterator[str]:
    """Blocks of about block_chars characters, whose concatenation is the file (with \\r\\n read as \\n).

    A block ends only where no tokenizer in use joins the two sides, so tokenising the blocks apart gives the ids of the
    whole, in constant memory. Best is before a single space between two words: pre-tokenizers (GPT-2's, tiktoken's,
    Llama's, Qwen's) give that space to the word after it, and a SentencePiece "▁" put before an input is there already.
    Where there is none (Chinese, say), a block ends after a single newline between two characters that are no space.
    A newline elsewhere will not do: of three newlines before a word GPT-2 makes two pieces, of three at an end one.
    (16 blocks' worth of text without either is cut where it is.)
    """
    return (block for block, _ in placed_blocks(path, block_chars=block_chars))


def placed_blocks(path: str, place: Place | None = None, block_chars: int = 1_000_000) -> Iterator[tuple[str, Place]]:
    """`text_blocks` from a place on, each block with the place after it, from where the same blocks follow."""
    with reading(path), open_text(path) as file:
        position, skipped, primed = place or (0, 0, 0)
        file.seek(position)
        pieces = [(file.tell(), file.read(block_chars)) for _ in range(primed)]
        held = "".join(piece for _, piece in pieces)[skipped:]
        while True:
            position = file.tell()
            piece = file.read(block_chars)
            if not piece:
                break
            pieces, held = [*pieces, (position, piece)], held + piece
            if len(held) < block_chars:
                continue
            start = max(len(held) - len(piece) - 3, 0)  # what lies before was searched; a seam spans 3 characters
            cut = _last(BEFORE_SPACE, held, start) or _last(AFTER_NEWLINE, held, start)
            if not cut and len(held) > 16 * block_chars:
                cut = len(held)
            if cut:
                block, held = held[:cut], held[cut:]
                while len(pieces) > 1 and sum(len(piece) for _, piece in pieces[1:]) >= len(held):
                    del pieces[0]  # nothing of it is held any more
                read = sum(len(piece) for _, piece in pieces)
                yield block, (pieces[0][0], read - len(held), len(pieces))
        if held:
            yield held, (position, 0, 0)


Place = tuple[int, int, int]
"""Where a block begins: a position that the file can be put to, characters to leave out from there, and how many reads
had been made from there by then (what they read is not searched for a seam again)."""

BEFORE_SPACE = re.compile(r"\S(?= \S)")
AFTER_NEWLINE = re.compile(r"\S\n(?=\S)")


def _last(seam: re.Pattern[str], text: str, start: int) -> int:
    """Where the last seam from `start` on is, 0 if there is none."""
    end = 0
    for match in seam.finditer(text, start):
        end = match.end()
    return end


def documents(path: str, separator: str) -> Iterator[tuple[int, str]]:
    """(document number from 1, text) of a file cut at `separator`, which belongs to none; blank ones are left out.

    A shell hands over backslash-n as two characters, so \\n and \\t in the separator mean newline and tab.
    """
    separator = separator.replace("\\n", "\n").replace("\\t", "\t")
    if not separator:
        raise DataError("data.document_separator is empty; give the text between documents, such as '\\n\\n'")
    number, held = 0, ""
    with reading(path), open_text(path) as file:
        while piece := file.read(READ_CHARS):
            *whole, held = (held + piece).split(separator)
            for text in whole:
                if text.strip():
                    number += 1
                    yield number, text
    if held.strip():
        yield number + 1, held
