"""Lines of JSON, each with a SHA-256 that fixes every byte of the file up to it.

    hash of a line = SHA-256(hash of the line before, in hex, and the line's text before `, "sha256"`)

The first line has none before it. The chain has no secret: it shows accidents and careless edits. Who
keeps the last hash elsewhere (a checkpoint, a statement) can show any edit.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from hashlib import sha256
from typing import Any

_BEFORE, _AFTER = b', "sha256": "', b'"}'
_SUFFIX = len(_BEFORE) + 64 + len(_AFTER)


class LineError(ValueError):
    """A line of a log file that is not what it should be; `line` counts from 1."""

    def __init__(self, line: int, problem: object) -> None:
        super().__init__(f"line {line}: {problem}")
        self.line, self.problem = line, str(problem)


def chained(entry: dict[str, Any], head: str) -> tuple[bytes, str]:
    """The line of an entry after the line whose hash is `head` ("" before the first), and its hash."""
    text = json.dumps(entry, allow_nan=False).encode()[: -len("}")]
    head = _hash(head, text)
    return text + _BEFORE + head.encode() + _AFTER + b"\n", head


def lines_of(content: bytes) -> tuple[list[bytes], bytes]:
    """The whole lines, and the torn one that an interrupted append left at the end, mostly b""."""
    *whole, torn = content.split(b"\n")
    return whole, torn


def unchained(lines: list[bytes]) -> Iterator[tuple[Any, str]]:
    """What each line says, and its hash, which is checked first.

    Raises:
        LineError: at the first line that does not follow from the one before.
    """
    head = ""
    for number, line in enumerate(lines, 1):
        text, suffix = line[:-_SUFFIX], line[-_SUFFIX:]
        expected = _hash(head, text)
        if suffix != _BEFORE + expected.encode() + _AFTER:
            raise LineError(
                number,
                f"Expected it to end in the SHA-256 of itself after the line before, {expected[:8]}..., "
                f"got {line[-80:]!r}. It was edited, or lines before it were removed, moved or repeated.",
            )
        yield parsed(text + b"}", number), expected
        head = expected


def parsed(line: bytes, number: int) -> Any:
    """The JSON of a line; NaN and Infinity are not JSON."""
    try:
        return json.loads(line, parse_constant=_refuse)
    except ValueError as error:
        raise LineError(number, f"Expected JSON, got {line[:60]!r}.") from error


def _hash(head: str, text: bytes) -> str:
    return sha256(head.encode() + text).hexdigest()


def _refuse(name: str) -> None:
    raise ValueError(name)
