"""Fingerprints: whether a run that goes on is the run that stopped.

A step that is run again under the same key must be the very same step: another loss or other data under
the same noise would give the noise away. Nobody can compare programs; what is compared here is
everything that a step function reaches - bytecode, constants, closures, globals, modules, the tensors
they hold - and the bytes of the data. Whatever looks different is taken to be different.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import platform
import types
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import dpfunc
from dpfunc import trees

_LIBRARIES = ("torch", "dpfunc", "numpy", "optree", "functools", "builtins", "math", "typing")
_MOST_BYTES = 2**30
_SAMPLED_ROWS = 4096


def of_code(*things: Any) -> str:
    """SHA-256 over what functions and values consist of, in hex.

    An object whose class says `is_cache = True` is left out: it may change while the program runs.

    NOT PROTECTED: what is reached through files, the environment, C extensions, or names that are
    looked up by strings.
    """
    digest = _Digest()
    for thing in things:
        digest.feed(thing)
    return digest.hash.hexdigest()


def of_data(data: Any) -> str:
    """SHA-256 over a pytree of tensors or arrays, or over a data set, in hex.

    Up to a GiB every byte counts. Of more, and of a data set that is read example by example, it is
    the shape and 4096 examples spread over all of it.
    """
    hashed = hashlib.sha256()
    if hasattr(data, "__getitem__") and not isinstance(
        data, (Tensor, np.ndarray, tuple, list, dict)
    ):
        num = len(data)
        hashed.update(f"{type(data).__qualname__} {num}".encode())
        for row in _spread(num):
            _update(hashed, data[row])
        return hashed.hexdigest()
    _update(hashed, data)
    return hashed.hexdigest()


def of_machine(device: torch.device) -> dict[str, str]:
    """What the last bits of a sum depend on, beside the program."""
    return {
        "dpfunc": dpfunc.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": device.type if device.type == "cpu" else torch.cuda.get_device_name(device),
        "threads": str(torch.get_num_threads()),
    }


def _spread(num: int) -> list[int]:
    return sorted({i * num // _SAMPLED_ROWS for i in range(_SAMPLED_ROWS)}) if num else []


def _update(hashed: Any, tree: Any) -> None:
    for leaf in trees.leaves(tree):
        if isinstance(leaf, (Tensor, np.ndarray)):
            hashed.update(f"{leaf.dtype} {tuple(leaf.shape)}".encode())
            if leaf.nbytes > _MOST_BYTES and len(leaf) > _SAMPLED_ROWS:
                leaf = leaf[_spread(len(leaf))]
            hashed.update(_bytes_of(leaf))
        else:
            hashed.update(repr(leaf).encode())


def _bytes_of(leaf: Tensor | np.ndarray) -> Any:
    if isinstance(leaf, Tensor):
        flat = leaf.detach().cpu().contiguous().reshape(-1)
        return flat.view(torch.uint8).numpy().data if flat.numel() else b""
    return np.ascontiguousarray(leaf).reshape(-1).view(np.uint8).data if leaf.size else b""


class _Digest:
    """Feeds whatever a function can reach into one hash, each object once."""

    def __init__(self) -> None:
        self.hash = hashlib.sha256()
        self.seen: dict[int, tuple[int, Any]] = {}

    def feed(self, thing: Any) -> None:
        if thing is None or isinstance(thing, (bool, int, float, complex, str, bytes)):
            return self.say(f"{type(thing).__name__} {thing!r}")
        if getattr(type(thing), "is_cache", False):
            return None
        if id(thing) in self.seen:
            return self.say(f"again {self.seen[id(thing)][0]}")
        self.seen[id(thing)] = len(self.seen), thing  # kept alive, so that no other has its id
        self.say(f"{type(thing).__module__}.{type(thing).__qualname__}")
        self._feed_parts(thing)
        return None

    def say(self, text: str) -> None:
        self.hash.update(f"{len(text)}:{text}".encode())

    def _feed_parts(self, thing: Any) -> None:
        if isinstance(thing, (Tensor, np.ndarray)):
            _update(self.hash, thing)
        elif isinstance(thing, types.CodeType):
            for part in (thing.co_code, thing.co_names, thing.co_varnames, thing.co_consts):
                self.feed(part)
        elif isinstance(thing, dict):
            for key, value in thing.items():
                self.feed(key)
                self.feed(value)
        elif isinstance(thing, (tuple, list)):
            for part in thing:
                self.feed(part)
        elif isinstance(thing, (set, frozenset)):
            self.feed(sorted(map(repr, thing)))
        elif isinstance(thing, types.FunctionType):
            self._feed_function(thing)
        elif isinstance(thing, types.MethodType):
            self.feed((thing.__func__, thing.__self__))
        elif isinstance(thing, functools.partial):
            self.feed((thing.func, thing.args, thing.keywords))
        elif isinstance(thing, types.CellType):
            self.feed(_inside(thing))
        elif isinstance(thing, type):
            self._feed_class(thing)
        elif isinstance(thing, nn.Module):
            self._feed_module(thing)
        elif isinstance(thing, (types.ModuleType, types.BuiltinFunctionType, np.ufunc)):
            self.say(getattr(thing, "__name__", ""))
        else:
            self._feed_object(thing)

    def _feed_function(self, function: types.FunctionType) -> None:
        compiled = getattr(function, "_torchdynamo_orig_callable", None)
        if compiled is not None:
            self.say("compiled")
            return self.feed(compiled)
        self.say(f"{function.__module__}.{function.__qualname__}")
        self.feed((function.__defaults__, function.__kwdefaults__))
        for name, cell in zip(
            function.__code__.co_freevars, function.__closure__ or (), strict=True
        ):
            self.say(name)
            self.feed(cell)
        if not _is_library(function.__module__):  # the versions of libraries are compared elsewhere
            self.feed(function.__code__)
            names = _names(function.__code__)
            for name in names:
                if name in function.__globals__:
                    self._feed_global(name, function.__globals__[name], names)
        return None

    def _feed_global(self, name: str, value: Any, names: list[str]) -> None:
        self.say(name)
        self.feed(value)
        if isinstance(value, types.ModuleType) and not _is_library(value.__name__):
            for part in names:  # perhaps an attribute of the module
                if part in vars(value):
                    self._feed_global(part, vars(value)[part], [])

    def _feed_class(self, kind: type) -> None:
        self.say(f"{kind.__module__}.{kind.__qualname__}")
        if not _is_library(kind.__module__):
            self.feed(kind.__bases__)
            for name, part in vars(kind).items():
                if isinstance(part, (staticmethod, classmethod)):
                    part = part.__func__
                elif isinstance(part, property):
                    part = (part.fget, part.fset)
                if isinstance(part, (types.FunctionType, tuple, int, float, str)):
                    self.say(name)
                    self.feed(part)

    def _feed_module(self, module: nn.Module) -> None:
        """All but the parameters, which a step gets as an argument, and which start anywhere."""
        self.feed(type(module))
        for name, value in vars(module).items():
            if name == "_parameters":
                self.feed([(n, p is None) for n, p in value.items()])
            elif not name.endswith("_hooks") and not name.startswith("_backward"):
                self.say(name)
                self.feed(value)

    def _feed_object(self, thing: Any) -> None:
        self.feed(type(thing))
        if dataclasses.is_dataclass(thing):
            for field in dataclasses.fields(thing):
                self.feed((field.name, getattr(thing, field.name, None)))
            return
        slots = [n for k in type(thing).__mro__ for n in getattr(k, "__slots__", ())]
        for name in slots if not hasattr(thing, "__dict__") else vars(thing):
            self.feed((name, getattr(thing, name, None)))


def _inside(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # empty
        return None


def _names(code: types.CodeType) -> list[str]:
    """The globals that a function and the functions inside it may name."""
    inner = [part for part in code.co_consts if isinstance(part, types.CodeType)]
    return sorted({*code.co_names, *(name for part in inner for name in _names(part))})


def _is_library(module: str | None) -> bool:
    return (module or "").split(".")[0] in _LIBRARIES


def differences(before: dict[str, Any], now: dict[str, Any]) -> str:
    """What two records say differently, in words; empty where they agree."""
    changed = [
        f"{name} was {json.dumps(before.get(name))[:200]} and is {json.dumps(now.get(name))[:200]}"
        for name in sorted({*before, *now})
        if before.get(name) != now.get(name)
    ]
    return "; ".join(changed)
