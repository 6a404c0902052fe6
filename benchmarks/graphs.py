"""What a step computes, whatever the machine: matrix products, convolutions and FLOPs of its graph."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from models import Model
from torch import Tensor, nn
from torch._functorch.compile_utils import fx_graph_cse
from torch.func import functional_call
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree
from torch.utils.flop_counter import FlopCounterMode

import dpfunc
from dpfunc.gradients.clipped import METHODS

MATMULS = {"mm", "addmm", "bmm", "baddbmm"}
CONVOLUTIONS = {"convolution", "convolution_backward"}


def backward_flops(
    grad: tuple[int, ...], x: tuple[int, ...], weight: tuple[int, ...], *args: Any, **kwargs: Any
) -> int:
    """torch's own formula does not divide by the groups, which vmap makes one for each example."""
    wanted = sum(args[-1][:2])
    return 2 * torch.Size(grad).numel() * torch.Size(weight[1:]).numel() * wanted


def counts(graph: GraphModule, *args: Any) -> dict[str, int]:
    """Of the graph without dead and repeated nodes, which is what a compiler begins with."""
    graph.graph.eliminate_dead_code()
    graph = GraphModule(graph, fx_graph_cse(graph.graph))
    names = [getattr(node.target, "_opname", "") for node in graph.graph.nodes]
    counter = FlopCounterMode(
        display=False, custom_mapping={torch.ops.aten.convolution_backward: backward_flops}
    )
    with counter, torch.no_grad():
        graph(*_pytree.tree_leaves(args))
    return {
        "matmuls": sum(name in MATMULS for name in names),
        "convolutions": sum(name in CONVOLUTIONS for name in names),
        "flops": counter.get_total_flops(),
    }


def non_private(module: nn.Module, model: Model) -> Callable[..., Any]:
    def loss(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return model.criterion(functional_call(module, params, (x,)), y)

    return torch.func.grad(loss)


def clipped(module: nn.Module, model: Model, clip_norm: float, method: str) -> Callable[..., Any]:
    loss, _ = dpfunc.functional_loss(module, model.criterion)
    summed = dpfunc.clipped_grad(loss, clip_norm, method=method)
    return lambda params, x, y: summed(params, (x, y)).sum


def graphs(model: Model, clip_norm: float) -> dict[str, Any]:
    """The forward and backward pass that is not private, and dpfunc's clipped sum by each method."""
    module = copy.deepcopy(model.module)
    functions = {"non-private": non_private(module, model)}
    for method in METHODS:
        functions[f"dpfunc {method}"] = clipped(module, model, clip_norm, method)
    args = (model.trainable(), model.inputs, model.targets)
    rows: dict[str, Any] = {}
    for name, function in functions.items():
        try:
            rows[name] = counts(make_fx(function)(*args), *args)
        except Exception as error:
            rows[name] = f"{type(error).__name__}: {error}"
    return rows
