"""One abstract run of a loss: which parameters meet only ops with a rule, and where.

The loss runs once on one example of zeros, with an autograd graph and torch's generators put back
afterwards. A parameter gets its gradient from rules when every path of that graph from the loss to the
parameter goes through an op with a rule. That finds what a list of calls would miss: a parameter
inside a list, a custom autograd Function, a compiled op. All others are differentiated for each
example. No example is looked at, so one plan serves every batch of one signature; what each run does
with the parameters is held against it.
"""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import numpy as np
import optree
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

from dpfunc.gradients.layers import RULES, Rule, Use
from dpfunc.gradients.per_sample import checked
from dpfunc.gradients.plan import Calls, Parameters, Plan, Region, Sighting, storage, tensors_of
from dpfunc.typing import Loss, Tree

Shape = tuple[tuple[int, ...], torch.dtype, torch.device]
"""A tensor without its numbers: shape, dtype, device."""


def make_plan(
    loss: Loss,
    has_aux: bool,
    skeleton: Tree,
    shapes: tuple[Shape, ...],
    values: list[Tensor] | None = None,
) -> Plan:
    """The plan for a loss. skeleton: (params, *arguments of one example), a number for each tensor.

    values are those of the params, where they can be had: a loss may branch on them.

    Raises:
        RuntimeError: the loss branches on values, or changes a tensor that it closes over.
        ValueError: no parameter reaches the loss, or it uses the statistics of a batch.
    """
    devices = {device for _, _, device in shapes if device.type == "cuda"}
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.random.fork_rng(devices=list(devices)),
    ):
        count = len(optree.tree_leaves(skeleton[0]))  # params are numbered first
        tensors = [
            torch.zeros(size, dtype=dtype, device=device, requires_grad=i < count)
            for i, (size, dtype, device) in enumerate(shapes)
        ]
        if values is not None:
            with torch.no_grad():
                for tensor, value in zip(tensors[:count], values, strict=True):
                    tensor.copy_(value)
        params, *arguments = optree.tree_map(tensors.__getitem__, skeleton)
        trace = _Trace(tensors[:count])
        with trace:
            value, _ = checked(loss, has_aux)(params, *arguments)
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
        super().__init__(self._visit, Parameters(leaves))
        self.leaves = leaves
        self.names: list[str] = []
        self.seen: list[_Seen] = []
        self.hooked: set[int] = set()
        self.hidden = False
        self.made: dict[int, Tensor] = {}  # by storage, what the loss itself has made

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = tensors_of((args, kwargs))
        self._refuse(func, args, kwargs or {})
        self.hidden |= func in RULES and not torch.is_grad_enabled()
        if "hook" in getattr(func, "__name__", ""):
            self.hooked |= {found[0] for t in given if (found := self._find(t))}
        output = super().__torch_function__(func, types, args, kwargs)
        before = {storage(t) for t in given}
        for tensor in tensors_of(output):
            place = storage(tensor)
            if place is not None and place not in before:
                self.made[place] = tensor
        return output

    def _find(self, tensor: Tensor) -> tuple[int, Region] | None:
        return self.parameters.find(tensor) if self.parameters else None

    def _refuse(self, func: Any, args: Any, kwargs: Any) -> None:
        if func is F.batch_norm:
            bound = _BATCH_NORM.bind(*args, **kwargs).arguments
            if bound.get("training") or bound.get("running_mean") is None:
                raise ValueError(
                    "Expected a loss that treats every example apart, got batch_norm with the "
                    "statistics of the batch. Use nn.GroupNorm, or freeze the layer with .eval()."
                )
        name = getattr(func, "__name__", "")
        writes = (name.endswith("_") and not name.endswith("__")) or name == "__setitem__"
        written = kwargs["out"] if isinstance(kwargs.get("out"), Tensor) else None
        if writes and args and isinstance(args[0], Tensor) and name != "requires_grad_":
            written = args[0]
        place = None if written is None else storage(written)
        if place is not None and place not in self.made:
            raise RuntimeError(f"in-place {name} on a tensor that is not the loss's own")

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
        found = self._find(use.weight)
        others = tensors_of(arguments)
        onward = [t for t in others if t is not use.weight]
        if found is None or len(onward) != len(others) - 1 or not self._is_view(use.weight):
            return None
        leaf, _ = found
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
            shape=tuple(output.shape),
            dtype=output.dtype,
        )
        return _Seen(sighting, output.grad_fn, onward, [(t, t._version) for t in use.inputs])

    def _is_view(self, weight: Tensor) -> bool:
        """Whether a gradient at this tensor is the parameter's own, entry by entry."""
        if weight.is_neg() or weight.is_complex() or is_functorch_wrapped_tensor(weight):
            return False
        if weight.grad_fn is None:
            return weight.requires_grad
        node: Any = weight.grad_fn
        while not hasattr(node, "variable"):
            if not type(node).__name__.startswith(_VIEWS):
                return False
            ((node, _),) = [edge for edge in node.next_functions if edge[0] is not None]
        return True

    def plan(self, value: Tensor) -> Plan:
        reached = self._reached_without_rules(value)
        reasons = []
        for i, leaf in enumerate(self.leaves):
            seen = [s for s in self.seen if s.sighting.leaf == i]
            reason = ""
            if id(leaf) in reached or i in self.hooked:
                reason = (
                    "an op that it meets has no rule"
                    if leaf.ndim > 1
                    else "as small as what it touches"
                )
            elif any(t._version != version for s in seen for t, version in s.versions):
                reason = "an op's input is changed in place afterwards"
            elif _overlap({s.sighting.region for s in seen}, leaf.numel()):
                reason = "is met through overlapping views"
            reasons.append(reason)
        kept = [s.sighting for s in self.seen if not reasons[s.sighting.leaf]]
        return Plan(
            tuple(self.names), tuple(kept), tuple(reasons), tuple(self.touches), self.hidden
        )

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


_BATCH_NORM = inspect.signature(F.batch_norm)
_VIEWS = (
    "AliasBackward",
    "AsStridedBackward",
    "DiagonalBackward",
    "NarrowBackward",
    "PermuteBackward",
    "ReshapeAliasBackward",
    "SelectBackward",
    "SliceBackward",
    "SplitBackward",
    "SplitWithSizesBackward",
    "SqueezeBackward",
    "TBackward",
    "TransposeBackward",
    "UnbindBackward",
    "UnsafeViewBackward",
    "UnsqueezeBackward",
    "ViewBackward",
)
"""Autograd nodes that move the entries of a gradient and change none."""
