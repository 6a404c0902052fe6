"""Checkpoints: a `TrainState` in one file, tensors as safetensors and the rest as JSON in its header."""

from __future__ import annotations

import json
import os
from typing import Any, NamedTuple, cast

import optree
from torch import Tensor

from dpfunc.accounting.logfile import replace_file
from dpfunc.step import TrainState

FORMAT = 1


class Checkpoint(NamedTuple):
    """A state, and what was said about it when it was saved."""

    state: TrainState
    about: dict[str, Any]


def save_checkpoint(
    path: str | os.PathLike[str], state: TrainState, *, about: dict[str, Any] | None = None
) -> None:
    """Save a state, whole or not at all.

    Args:
        path: of the file, ending in .safetensors by custom; replaced where it exists.
        state: what `make_train_step` carries: of tensors, and of Python numbers at most.
        about: further facts, of what JSON can hold. Never a key.

    Guarantees:
        A kill, or a full disk, leaves the old file or the new one; it is on disk when this returns.
        `load_checkpoint` gives the same bits back. Nothing is pickled.

    Raises:
        TypeError: a leaf that is neither a tensor nor a number; facts that JSON has no form for.
        OSError: the folder does not exist or cannot be written.
        ModuleNotFoundError: safetensors is not installed (`pip install dpfunc[train]`).

    >>> import tempfile, torch
    >>> from pathlib import Path
    >>> state = TrainState({"w": torch.ones(2)}, ())
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_checkpoint(Path(folder) / "c.safetensors", state, about={"step": 7})
    ...     load_checkpoint(Path(folder) / "c.safetensors", state).about
    {'step': 7}
    """
    from safetensors.torch import save

    tensors, numbers = {}, {}
    for name, leaf in _named(state).items():
        if isinstance(leaf, Tensor):
            tensors[name] = leaf.detach().clone().contiguous()  # safetensors takes no shared memory
        elif isinstance(leaf, (bool, int, float)):
            numbers[name] = leaf
        else:
            raise TypeError(
                f"Expected a state of tensors and numbers, got a {type(leaf).__name__} at {name}."
            )
    header = {"format": FORMAT, "numbers": numbers, "about": about or {}}
    replace_file(path, save(tensors, metadata={"dpfunc": json.dumps(header)}))


def load_checkpoint(path: str | os.PathLike[str], like: TrainState) -> Checkpoint:
    """Load a state that `save_checkpoint` saved.

    Args:
        path: of the file.
        like: a state of the same model and optimizer, such as `init(params)`: it gives the structure, the
            shapes and dtypes that are expected, and the devices to load to.

    Returns:
        A Checkpoint(state, about).

    Guarantees:
        The same bits that were saved. A file of another model or optimizer is an error that names the
        first leaf that differs.

    Raises:
        ValueError: no checkpoint of this format; another structure, shape or dtype.
        OSError: the file cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            metadata = (file.metadata() or {}).get("dpfunc")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(
            f"Expected {path} to be a checkpoint, got a damaged file: {error}."
        ) from error
    header = json.loads(metadata) if metadata else {}
    if header.get("format") != FORMAT:
        raise ValueError(
            f"Expected {path} to be a checkpoint of format {FORMAT}, got {header.get('format')!r}. "
            "Was it saved by a newer dpfunc, or is it a file of parameters alone?"
        )
    found = {**tensors, **header["numbers"]}
    wanted = _named(like)
    for name in [*wanted, *found]:
        _check_same(path, name, wanted.get(name), found.get(name))
    placed = [
        found[name].to(leaf.device) if isinstance(leaf, Tensor) else found[name]
        for name, leaf in wanted.items()
    ]
    structure = optree.tree_structure(cast("Any", like))
    return Checkpoint(cast("TrainState", optree.tree_unflatten(structure, placed)), header["about"])


def _named(state: TrainState) -> dict[str, Any]:
    """Leaves by the names that they have in the file."""
    paths, leaves, _ = optree.tree_flatten_with_path(cast("Any", state))
    fields = dict(enumerate(TrainState._fields))
    names = ["/".join([fields.get(path[0], "?"), *map(repr, path[1:])]) for path in paths]
    return dict(zip(names, leaves, strict=True))


def _check_same(path: Any, name: str, wanted: Any, found: Any) -> None:
    if _form(wanted) != _form(found):
        raise ValueError(
            f"Expected {path} to hold {_form(wanted)} at {name}, got {_form(found)}. "
            "Is it of another model, optimizer or mechanism?"
        )


def _form(leaf: Any) -> str:
    if isinstance(leaf, Tensor):
        return f"{leaf.dtype} of shape {tuple(leaf.shape)}"
    return "nothing" if leaf is None else type(leaf).__name__
