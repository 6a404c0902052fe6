"""The log on disk: one JSON object a line, a header first. Everything in it is public."""

from __future__ import annotations

import json
import math
import os
import tempfile
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from dpfunc.events import AnyLog, Log, StepEvent

FORMAT = 1
ALWAYS = ("noise_multiplier", "sampling_prob", "count", "mechanism", "sampling", "relation")
"""The fields that the first version wrote, and every version writes. To leave one out would be to
guess: most of their defaults are those that cost the least privacy."""
LATER = {field.name: field.default for field in fields(StepEvent) if field.name not in ALWAYS}
"""Fields that came later, written where they differ from their default, and read as it if missing."""


def write_log(path: str | os.PathLike[str], log: AnyLog) -> None:
    """Write a log, whole or not at all.

    Args:
        path: of the file; replaced where it exists.
        log: what ran.

    Guarantees:
        `read_log(path) == log`. A log that uses no later field is written as the first version did.
        A kill leaves the old file or the new one. No key is in it.

    Raises:
        OSError: the folder does not exist or cannot be written.
    """
    lines = [json.dumps({"dpfunc_log": FORMAT})]
    lines += [json.dumps(event_to_json(event), allow_nan=False) for event in Log(log)]
    replace_file(path, "".join(line + "\n" for line in lines).encode())


def read_log(path: str | os.PathLike[str]) -> Log:
    """Read a log that `write_log` wrote.

    Args:
        path: of the file.

    Returns:
        The log. A file from before a field was added reads as one with that field's default.

    Raises:
        ValueError: another format or version, an unknown field, a missing one that every version
            writes, a damaged line.
        OSError: the file cannot be read.
    """
    text = Path(path).read_text()
    lines = text.splitlines()
    header = _parse(lines[0], path, 1) if lines else None
    if not isinstance(header, dict) or header.get("dpfunc_log") != FORMAT:
        raise ValueError(
            f'Expected {path} to begin with {{"dpfunc_log": {FORMAT}}}, got {text[:40]!r}.'
        )
    if not text.endswith("\n"):
        raise ValueError(f"Expected {path} to end with a whole line; it is cut off.")
    return Log(_from_json(_parse(line, path, n), path, n) for n, line in enumerate(lines[1:], 2))


def replace_file(path: str | os.PathLike[str], content: bytes) -> None:
    """Put content at path through a rename, so that no reader ever sees half of it."""
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"Expected a folder at {path.parent}, found none.")
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def event_to_json(event: StepEvent) -> dict[str, Any]:
    """An event as JSON can hold it."""
    # JSON has no infinity; the string reads back through float().
    return {
        name: "inf" if value == math.inf else value
        for name, value in asdict(event).items()
        if name not in LATER or value != LATER[name]
    }


def _parse(line: str, path: Any, number: int) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"Expected line {number} of {path} to be JSON, got {line[:60]!r}."
        ) from error


def _from_json(entry: Any, path: Any, number: int) -> StepEvent:
    if not isinstance(entry, dict) or set(entry) - set(LATER) != set(ALWAYS):
        raise ValueError(
            f"Expected line {number} of {path} to have the fields {', '.join(ALWAYS)}, and beside them "
            f"at most {', '.join(LATER)}, got {entry!r}."
        )
    if entry["noise_multiplier"] == "inf":
        entry = {**entry, "noise_multiplier": math.inf}
    return StepEvent(**entry)
