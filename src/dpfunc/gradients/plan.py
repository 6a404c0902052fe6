"""What an abstract run of a loss found out, and the mode that watches this and every other run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor
from torch._C._functorch import (
    get_unwrapped,
    is_functorch_wrapped_tensor,
    is_gradtrackingtensor,
)
from torch.overrides import TorchFunctionMode

from dpfunc.gradients.layers import RULES, expanded


class Region(NamedTuple):
    """A part of a parameter, as a view of its numbers laid out in order."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


class Sighting(NamedTuple):
    """A parameter met by a call to an op with a rule."""

    call: int
    """Which of the calls to ops with rules, in order."""
    use: int
    """Which of the uses that the rule names."""
    constants: tuple[Any, ...]
    leaf: int
    """Which parameter, by number."""
    region: Region | None
    """None: all of it."""
    transposed: bool
    """Whether the op saw the transpose of the region."""
    shape: tuple[int, ...]
    dtype: torch.dtype
    """Of the op's output for one example."""


class Touch(NamedTuple):
    """A function that took a parameter or a view of it."""

    function: str
    leaf: int
    region: Region


class Plan(NamedTuple):
    calls: tuple[str, ...]
    """The ops with rules that the loss calls, in order."""
    sightings: tuple[Sighting, ...]
    reasons: tuple[str, ...]
    """For each parameter why it is differentiated for each example; empty where rules serve it."""
    touches: tuple[Touch, ...]
    """What takes parameters, in order."""
    hidden: bool
    """Whether an op with a rule ran without grad: in a custom Function, which compilers inline."""


class Parameters:
    """Finds which parameter a tensor is, or is a view of, and where."""

    def __init__(self, leaves: list[Tensor]) -> None:
        storages = [storage(leaf) for leaf in leaves]
        self.places = {  # parameters that share their memory are not told apart
            place: (i, leaf.storage_offset())
            for i, (leaf, place) in enumerate(zip(leaves, storages, strict=True))
            if place is not None and storages.count(place) == 1
        }

    def find(self, tensor: Tensor) -> tuple[int, Region] | None:
        while is_gradtrackingtensor(tensor):
            tensor = get_unwrapped(tensor)
        place = storage(tensor)
        if place not in self.places:
            return None
        leaf, begin = self.places[place]
        region = tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()) - int(begin)
        return leaf, Region(*region)


class Calls(TorchFunctionMode):
    """Shows every differentiable call to an op with a rule to `visit(op, rule, args, kwargs, output)`.

    Composite functions that would hide their ops are replaced by what they consist of. What takes
    one of the parameters is noted in touches; None notes nothing, which compilers can follow.
    """

    def __init__(self, visit: Callable[..., Any], parameters: Parameters | None) -> None:
        super().__init__()
        self.visit = visit
        self.parameters = parameters
        self.touches: list[Touch] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        parts = expanded(func)
        if parts is not None:
            with self:
                return parts(*args, **kwargs)
        if self.parameters is not None and torch.is_grad_enabled():
            self._note(func, tensors_of((args, kwargs)))
        output = func(*args, **kwargs)
        rule = RULES.get(func)
        if rule is None or not torch.is_grad_enabled():
            return output
        return self.visit(func, rule, args, kwargs, output)

    def _note(self, func: Any, tensors: list[Tensor]) -> None:
        name = getattr(func, "__name__", str(func))
        if name != "custom_function_call":  # torch.func's word for a Function's forward
            found = filter(None, map(self.parameters.find, tensors)) if self.parameters else ()
            self.touches.extend(Touch(name, leaf, region) for leaf, region in found)


def tensors_of(tree: Any) -> list[Tensor]:
    return [leaf for leaf in optree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def storage(tensor: Tensor) -> int | None:
    """What tells the memory of a tensor from others'; None inside torch.func's transforms."""
    if is_functorch_wrapped_tensor(tensor) or tensor.layout != torch.strided:
        return None
    return tensor.untyped_storage()._cdata
