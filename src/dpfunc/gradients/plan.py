"""One abstract run of a loss: which parameters meet only ops with a rule, and where.

The loss runs once on one example of fake tensors: shapes without numbers, no random draws, and an
autograd graph. A parameter gets its gradient from rules when every path of that graph from the loss
to the parameter goes through an op with a rule. That finds what a list of calls would miss: a
parameter inside a list, a custom autograd Function, a compiled op. All others are differentiated for
each example. Shapes alone decide, so one plan serves every batch of one signature.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import optree
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, UnsupportedFakeTensorException
from torch.overrides import TorchFunctionMode

from dpfunc.gradients.layers import RULES, Rule, Use, expanded
from dpfunc.gradients.per_sample import checked
from dpfunc.typing import Loss, Tree


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
    direct: bool
    """Whether the op saw the parameter itself and not a view."""
    shape: tuple[int, ...]
    dtype: torch.dtype
    """Of the op's output for one example."""


class Plan(NamedTuple):
    calls: tuple[str, ...]
    """The ops with rules that the loss calls, in order."""
    sightings: tuple[Sighting, ...]
    reasons: tuple[str, ...]
    """For each parameter why it is differentiated for each example; empty where rules serve it."""
    ops: tuple[tuple[str, ...], ...]
    """For each parameter the ops that take it or a view of it, in order."""
    hidden: bool
    """Whether an op with a rule ran without grad: in a custom Function, which compilers inline."""


class Calls(TorchFunctionMode):
    """Shows every differentiable call to an op with a rule to `visit(op, rule, args, kwargs, output)`.

    Composite functions that would hide their ops are replaced by what they consist of.
    """

    def __init__(self, visit: Callable[..., Any]) -> None:
        super().__init__()
        self.visit = visit

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        parts = expanded(func)
        if parts is not None:
            with self:
                return parts(*args, **kwargs)
        output = func(*args, **kwargs)
        rule = RULES.get(func)
        if rule is None or not torch.is_grad_enabled():
            return output
        return self.visit(func, rule, args, kwargs, output)


Shape = tuple[tuple[int, ...], torch.dtype, torch.device]
"""A tensor without its numbers: shape, dtype, device."""


def make_plan(loss: Loss, has_aux: bool, skeleton: Tree, shapes: tuple[Shape, ...]) -> Plan:
    """The plan for a loss. skeleton: (params, *arguments of one example), a number for each tensor.

    Raises:
        RuntimeError: the loss branches on values, or changes a tensor that it closes over.
        ValueError: no parameter reaches the loss, or it uses the statistics of a batch.
    """
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        FakeTensorMode(allow_non_fake_inputs=True),
    ):
        count = len(optree.tree_leaves(skeleton[0]))  # params are numbered first
        tensors = [
            torch.empty(size, dtype=dtype, device=device, requires_grad=i < count)
            for i, (size, dtype, device) in enumerate(shapes)
        ]
        params, *arguments = optree.tree_map(tensors.__getitem__, skeleton)
        trace = _Trace(tensors[:count])
        try:
            with trace:
                value, _ = checked(loss, has_aux)(params, *arguments)
        except UnsupportedFakeTensorException as error:
            return Plan((), (), (f"cannot be traced: {error}",) * count, ((),) * count, False)
        if value.grad_fn is None:
            raise ValueError(
                "Expected a loss that depends on params, got one that uses none of them. Does it call "
                "a module with its own parameters? functional_loss(module, criterion) makes one that "
                "does not."
            )
        return trace.plan(value)


class _Seen(NamedTuple):
    sighting: Sighting
    node: Any
    """The autograd node of the op."""
    onward: list[Tensor]
    """What else the op takes, where paths to other parameters go on."""
    versions: list[tuple[Tensor, int]]
    """The inputs and how often each had been written to."""


class _Trace(Calls):
    def __init__(self, leaves: list[Tensor]) -> None:
        super().__init__(self._visit)
        self.leaves = leaves
        self.owners = {_storage(leaf): i for i, leaf in enumerate(leaves)}
        self.names: list[str] = []
        self.seen: list[_Seen] = []
        self.ops: list[list[str]] = [[] for _ in leaves]
        self.hidden = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        _refuse(func, args, kwargs or {})
        self.hidden |= func in RULES and not torch.is_grad_enabled()
        name = getattr(func, "__name__", str(func))
        for leaf in {self._owner(t) for t in _tensors((args, kwargs))}:
            if leaf is not None and name != "__get__" and expanded(func) is None:
                self.ops[leaf].append(name)
        return super().__torch_function__(func, types, args, kwargs)

    def _owner(self, tensor: Tensor) -> int | None:
        """Which parameter a tensor is, or is a view of."""
        if is_functorch_wrapped_tensor(tensor) or not isinstance(tensor, FakeTensor):
            return None
        return self.owners.get(_storage(tensor))

    def _visit(self, func: Any, rule: Rule, args: Any, kwargs: Any, output: Tensor) -> Tensor:
        self.names.append(func.__name__)
        if is_functorch_wrapped_tensor(output) or output.grad_fn is None:
            return output
        found = [
            seen
            for i, use in enumerate(rule.uses(*args, **kwargs))
            if (seen := self._sight(rule, i, use, (args, kwargs), output)) is not None
        ]
        self.seen.extend(found)
        return output + 0 if found else output

    def _sight(self, rule: Rule, i: int, use: Use, arguments: Any, output: Tensor) -> _Seen | None:
        leaf = self._owner(use.weight)
        others = _tensors(arguments)
        onward = [t for t in others if t is not use.weight]
        if leaf is None or not use.weight.requires_grad or len(onward) != len(others) - 1:
            return None
        region, transposed = _region(use.weight)
        if region is None or (transposed and not rule.transposable):
            return None
        sighting = Sighting(
            call=len(self.names) - 1,
            use=i,
            constants=use.constants,
            leaf=leaf,
            region=None if region == _whole(self.leaves[leaf]) else region,
            transposed=transposed,
            direct=use.weight is self.leaves[leaf],
            shape=tuple(output.shape),
            dtype=output.dtype,
        )
        return _Seen(sighting, output.grad_fn, onward, [(t, t._version) for t in use.inputs])

    def plan(self, value: Tensor) -> Plan:
        reached = self._reached_without_rules(value)
        reasons = []
        for i, leaf in enumerate(self.leaves):
            seen = [s for s in self.seen if s.sighting.leaf == i]
            reason = ""
            if id(leaf) in reached:
                reason = (
                    "an op that it meets has no rule" if leaf.ndim > 1 else "as small as outputs"
                )
            elif any(t._version != version for s in seen for t, version in s.versions):
                reason = "an op's input is changed in place afterwards"
            elif _overlap({s.sighting.region for s in seen}, leaf.numel()):
                reason = "is met through overlapping views"
            reasons.append(reason)
        kept = [s.sighting for s in self.seen if not reasons[s.sighting.leaf]]
        ops = tuple(map(tuple, self.ops))
        return Plan(tuple(self.names), tuple(kept), tuple(reasons), ops, self.hidden)

    def _reached_without_rules(self, value: Tensor) -> set[int]:
        """Walk the autograd graph back from the loss, leaping over the weights that rules serve."""
        by_node: dict[Any, list[_Seen]] = {}
        for seen in self.seen:
            by_node.setdefault(seen.node, []).append(seen)
        reached: set[int] = set()
        visited: set[Any] = set()
        todo: list[Any] = [value.grad_fn]
        while todo:
            node = todo.pop()
            if node is None or node in visited:
                continue
            visited.add(node)
            if node in by_node:
                first, *rest = by_node[node]
                onward = first.onward
                for seen in rest:  # what every sighting of this op leaves to others
                    onward = [t for t in onward if any(t is o for o in seen.onward)]
                reached |= {id(t) for t in onward if t.grad_fn is None}
                todo.extend(t.grad_fn for t in onward)
            elif hasattr(node, "variable"):
                reached.add(id(node.variable))
            else:
                todo.extend(child for child, _ in node.next_functions)
        return reached


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in optree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _whole(leaf: Tensor) -> Region:
    return Region(tuple(leaf.shape), leaf.stride(), 0)


def _region(view: Tensor) -> tuple[Region | None, bool]:
    """Where a view lies in its parameter, axes by falling stride; None where entries repeat."""
    axes = sorted(range(view.ndim), key=lambda a: (-view.stride(a), a))
    size = tuple(view.shape[a] for a in axes)
    stride = tuple(view.stride(a) for a in axes)
    within = 0
    for n, step in zip(reversed(size), reversed(stride), strict=True):
        if n > 1 and step <= within:
            return None, False
        within += (n - 1) * step
    straight = axes == list(range(view.ndim))
    if not straight and view.ndim != 2:
        return None, False
    return Region(size, stride, int(view.storage_offset())), not straight


def _overlap(regions: set[Region | None], numel: int) -> bool:
    if len(regions) < 2 or None in regions:
        return len(regions) > 1
    count = np.zeros(numel, dtype=np.int8)
    for region in filter(None, regions):
        strides = tuple(step * count.itemsize for step in region.stride)
        view = np.lib.stride_tricks.as_strided(count[region.offset :], region.size, strides)
        if view.any():
            return True
        view[...] = 1
    return False


def _refuse(func: Any, args: Any, kwargs: Any) -> None:
    name = getattr(func, "__name__", "")
    if func is F.batch_norm:
        bound = _BATCH_NORM.bind(*args, **kwargs)
        if bound.arguments.get("training") or bound.arguments.get("running_mean") is None:
            raise ValueError(
                "Expected a loss that treats every example apart, got batch_norm with the statistics of "
                "the batch. Use nn.GroupNorm, or freeze the layer with .eval()."
            )
    in_place = name.endswith("_") and not name.endswith("__")
    first = args[0] if args else None
    if not in_place or not isinstance(first, Tensor):
        return
    made_here = isinstance(first, FakeTensor) or is_functorch_wrapped_tensor(first)
    if not made_here:
        raise RuntimeError(f"in-place {name} on a captured tensor of shape {tuple(first.shape)}")


_BATCH_NORM = inspect.signature(F.batch_norm)
