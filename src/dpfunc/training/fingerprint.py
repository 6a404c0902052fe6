"""Fingerprints: whether a run that goes on is the run that stopped.

A step that is run again under the same key must be the very same step: another loss or other data under
the same noise would give the noise away. Nobody can compare programs; what is compared here is
everything that a step function reaches - bytecode, constants, closures, globals, modules, the tensors
they hold - and the bytes of the data. Whatever looks different is taken to be different, and so is
whatever cannot be looked at.
"""

from __future__ import annotations

import copyreg
import functools
import hashlib
import hmac
import platform
import secrets
import sys
import types
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import dpfunc
from dpfunc import random
from dpfunc.typing import Key

_LIBRARIES = ("torch", "dpfunc", "numpy", "optree")
_MOST_BYTES = 2**30
_SAMPLED_ROWS = 4096
_PLAIN = (type(None), bool, int, float, complex, str, bytes, range, type(...), type(NotImplemented))
_NAMED = (types.ModuleType, np.ufunc, torch.dtype, torch.device, torch.layout, torch.memory_format)


def of_code(*things: Any) -> str:
    """SHA-256 over what functions and values consist of, in hex.

    An object whose class says `is_cache = True` is left out: it may change while the program runs. One
    that cannot be looked into makes a fingerprint that agrees with no other.

    NOT PROTECTED: what is reached through files, the environment, C extensions, or names that are
    looked up by strings.
    """
    digest = _Digest()
    for thing in things:
        digest.feed(thing)
    return digest.hash.hexdigest()


def of_data(data: Any) -> str:
    """SHA-256 over a pytree of tensors or arrays, or over a data set, in hex.

    Of a leaf up to a GiB every byte counts, of a larger one 4096 rows spread over all of it. Of a
    data set it is what the object holds and does, and 4096 of its examples; of a Hugging Face table
    its own fingerprint.
    """
    digest = _Digest()
    if isinstance(data, (Tensor, np.ndarray, tuple, list, dict)) or not hasattr(data, "__len__"):
        digest.feed(data)
        return digest.hash.hexdigest()
    digest.feed(len(data))
    if isinstance(own := getattr(data, "_fingerprint", None), str):
        digest.feed(own)
        return digest.hash.hexdigest()
    state = torch.get_rng_state()
    digest.feed(data)
    for row in _spread(len(data)):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(row)  # a data set that augments does so alike each time
            digest.feed(data[row])
    torch.set_rng_state(state)
    return digest.hash.hexdigest()


def keyed(fingerprint: str, key: Key) -> str:
    """A fingerprint that says nothing to whoever does not know the run's key.

    A plain hash of private data would tell two candidates for it apart.
    """
    secret = random.derive(key.cpu(), random.FINGERPRINT).numpy().tobytes()
    return hmac.new(secret, fingerprint.encode(), hashlib.sha256).hexdigest()


def of_machine(device: torch.device) -> dict[str, str]:
    """What the last bits of a sum depend on, beside the program."""
    autocast = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type)
    return {
        "dpfunc": dpfunc.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": device.type if device.type == "cpu" else torch.cuda.get_device_name(device),
        "threads": str(torch.get_num_threads()),
        "autocast": str(autocast),
        "default dtype": str(torch.get_default_dtype()),
        "matmul precision": torch.get_float32_matmul_precision(),
        "deterministic algorithms": str(torch.are_deterministic_algorithms_enabled()),
    }


def _spread(num: int) -> list[int]:
    return sorted({i * num // _SAMPLED_ROWS for i in range(_SAMPLED_ROWS)}) if num else []


def _bytes_of(leaf: Tensor | np.ndarray) -> Any:
    if leaf.nbytes > _MOST_BYTES and len(leaf) > _SAMPLED_ROWS:
        leaf = leaf[_spread(len(leaf))]
    if isinstance(leaf, Tensor):
        flat = leaf.detach().cpu().contiguous().reshape(-1)
        return flat.view(torch.uint8).numpy().data if flat.numel() else b""
    return np.ascontiguousarray(leaf).reshape(-1).view(np.uint8).data if leaf.size else b""


class _Digest:
    """Feeds whatever a thing can reach into one hash, each object once."""

    def __init__(self) -> None:
        self.hash = hashlib.sha256()
        self.seen: dict[int, tuple[int, Any]] = {}

    def say(self, text: str) -> None:
        self.hash.update(f"{len(text)}:{text}".encode())

    def feed(self, thing: Any) -> None:
        kind = type(thing)
        if isinstance(thing, _PLAIN) and kind in _PLAIN:
            return self.say(f"{kind.__name__} {thing!r}")
        if getattr(kind, "is_cache", False):
            return self.say("cache")
        if id(thing) in self.seen:
            return self.say(f"again {self.seen[id(thing)][0]}")
        self.seen[id(thing)] = len(self.seen), thing  # kept alive, so that no other has its id
        self.say(f"{kind.__module__}.{kind.__qualname__}")
        self._feed_parts(thing)
        return None

    def _feed_parts(self, thing: Any) -> None:
        match thing:
            case Tensor() | np.ndarray():
                if isinstance(thing, np.ndarray) and thing.dtype.hasobject:
                    return self.feed(thing.tolist())
                self.say(f"{thing.dtype} {tuple(thing.shape)}")
                self.hash.update(_bytes_of(thing))
            case np.generic() | slice() | PurePath():
                self.say(repr(thing))
            case bytearray():
                self.feed(bytes(thing))
            case types.CodeType():
                for part in (thing.co_code, thing.co_names, thing.co_varnames, thing.co_consts):
                    self.feed(part)
            case types.FunctionType():
                self._feed_function(thing)
            case types.MethodType():
                self.feed((thing.__func__, thing.__self__))
            case types.BuiltinFunctionType():
                self.say(thing.__qualname__)
                if not isinstance(thing.__self__, types.ModuleType):
                    self.feed(thing.__self__)
            case functools.partial():
                self.feed((thing.func, thing.args, thing.keywords))
            case types.CellType():
                self.feed(_inside(thing))
            case type():
                self._feed_class(thing)
            case nn.Module():
                self._feed_object(thing)
            case dict() | types.MappingProxyType():
                self.say(str(len(thing)))
                for key, value in thing.items():
                    self.feed(key)
                    self.feed(value)
                self._feed_attributes(thing)
            case tuple() | list():
                self.say(str(len(thing)))
                for part in thing:
                    self.feed(part)
                self._feed_attributes(thing)
            case set() | frozenset():
                self.feed(sorted(map(of_code, thing)))
            case _ if isinstance(thing, _NAMED):
                self.say(getattr(thing, "__name__", None) or str(thing))
            case _:
                self._feed_object(thing)
        return None

    def _feed_function(self, function: types.FunctionType) -> None:
        compiled = getattr(function, "_torchdynamo_orig_callable", None)
        if compiled is not None:
            self.say("compiled")
            return self.feed(compiled)
        self.say(f"{function.__module__}.{function.__qualname__}")
        self.feed((function.__defaults__, function.__kwdefaults__, vars(function)))
        # What functional_loss closes over gives the form alone: its parameters come as an argument.
        owns = function.__qualname__ == "functional_loss.<locals>.loss"
        for name, cell in zip(
            function.__code__.co_freevars, function.__closure__ or (), strict=True
        ):
            self.say(name)
            held = _inside(cell)
            if owns and name == "module" and isinstance(held, nn.Module):
                self._feed_form(held)
            else:
                self.feed(held)
        if not _is_library(function.__module__):  # the versions of libraries are compared elsewhere
            self.feed(function.__code__)
            names = _names(function.__code__)
            for name in names:
                if name in function.__globals__:
                    self._feed_global(name, function.__globals__[name], names)
                elif name in sys.modules:  # imported inside
                    self._feed_global(name, sys.modules[name], names)
        return None

    def _feed_global(self, name: str, value: Any, names: list[str]) -> None:
        self.say(name)
        met = id(value) in self.seen
        self.feed(value)
        if isinstance(value, types.ModuleType) and not _is_library(value.__name__) and not met:
            for part in names:  # perhaps an attribute of the module, or of one within it
                if part in vars(value):
                    self._feed_global(part, vars(value)[part], names)

    def _feed_class(self, kind: type) -> None:
        self.say(f"{kind.__module__}.{kind.__qualname__}")
        if _is_library(kind.__module__):
            return
        self.feed(kind.__bases__)
        for name, part in sorted(vars(kind).items()):
            if name in ("__dict__", "__weakref__", "__module__", "__doc__") or name.startswith(
                "_abc"
            ):
                continue
            if isinstance(part, (staticmethod, classmethod)):
                part = part.__func__
            elif isinstance(part, property):
                part = (part.fget, part.fset)
            elif isinstance(part, (types.MemberDescriptorType, types.GetSetDescriptorType)):
                continue  # a slot
            self.say(name)
            self.feed(part)

    def _feed_form(self, module: nn.Module) -> None:
        """All of a module but the values of its parameters."""
        for name, part in module.named_modules():
            self.say(name)
            self.feed(type(part))
            for attribute, value in vars(part).items():
                self.say(attribute)
                if attribute == "_parameters":
                    self.feed([(n, p is None) for n, p in value.items()])
                elif attribute != "_modules":
                    self.feed(value)

    def _feed_object(self, thing: Any) -> None:
        self.feed(type(thing))
        if self._feed_attributes(thing):
            return
        try:
            reduced = copyreg.dispatch_table.get(type(thing))
            made = reduced(thing) if reduced else thing.__reduce_ex__(2)
            # (type, arguments, state, items, pairs), or a name
            parts = (
                made if isinstance(made, str) else (*made[:3], *map(list, filter(None, made[3:])))
            )
        except Exception:
            self.say(f"cannot be looked into: {secrets.token_hex(16)}")
        else:
            self.feed(parts)

    def _feed_attributes(self, thing: Any) -> bool:
        """What is in an object's __dict__ and slots; whether it has either."""
        slots = []
        for kind in type(thing).__mro__:
            own = vars(kind).get("__slots__", ())
            for name in [own] if isinstance(own, str) else own:
                private = name.startswith("__") and not name.endswith("__")
                slots.append(f"_{kind.__name__.lstrip('_')}{name}" if private else name)
        held = dict(getattr(thing, "__dict__", {}))
        held |= {name: getattr(thing, name) for name in slots if hasattr(thing, name)}
        for name, value in held.items():
            self.say(name)
            # Hooks are numbered over the whole process.
            self.feed(list(value.values()) if name.endswith("_hooks") else value)
        return bool(slots) or hasattr(thing, "__dict__")


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
    top = (module or "").split(".")[0]
    return top in _LIBRARIES or top in sys.stdlib_module_names
