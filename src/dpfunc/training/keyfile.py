"""The run's key on disk: a file of its own, that its owner alone can read."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

import numpy as np
import torch

from dpfunc import random
from dpfunc.accounting.steplog.disk import sync_folder
from dpfunc.typing import Key

_ADVICE = "The key of a run is a secret for as long as anything that was released exists."


def write_key(path: Path, key: Key) -> None:
    """Write a key to a new file of mode 0600, on disk when this returns.

    Raises:
        FileExistsError: there is one already: a key is never replaced.
    """
    random.check_key(key)
    text = key.cpu().to(torch.int64).numpy().astype("<u4").tobytes().hex()
    descriptor, whole = tempfile.mkstemp(
        dir=path.parent, prefix=path.name, suffix=".part"
    )  # mode 0600
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.link(whole, path)  # which, unlike a rename, replaces nothing
    finally:
        os.unlink(whole)
    sync_folder(path.parent)


def read_key(path: Path) -> Key:
    """Read a key that `write_key` wrote.

    Raises:
        PermissionError: others may read the file.
        ValueError: it holds no key.
    """
    if os.name != "nt" and path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise PermissionError(
            f"Expected {path} to be readable by its owner alone, got mode "
            f"{stat.S_IMODE(path.stat().st_mode):o}. {_ADVICE} If nobody has read it: chmod 600."
        )
    try:
        words = np.frombuffer(bytes.fromhex(path.read_text().strip()), dtype="<u4")
        if words.shape != (8,):
            raise ValueError
    except ValueError:  # without what stands there
        raise ValueError(f"Expected {path} to hold 64 hex digits, got something else.") from None
    return torch.from_numpy(words.astype(np.int64))
