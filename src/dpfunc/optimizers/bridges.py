"""Optimizers of others: TorchOpt's transforms as pairs, `torch.optim` through `.grad`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from dpfunc.optimizers.pair import Optimizer
from dpfunc.typing import Params, Tree


def from_torchopt(transform: Any) -> Optimizer:
    """Make an (init, update) pair of a TorchOpt transform, which changes its arguments by default.

    Args:
        transform: what `torchopt.adam(...)`, `torchopt.chain(...)` and their like return: it has
            `init(params)` and `update(updates, state, *, params, inplace)`.

    Guarantees:
        The update is asked for with inplace=False: gradients, state and parameters are unchanged.

    Raises:
        TypeError: transform lacks init or update.

    Source: Ren et al. 2023, TorchOpt, JMLR 24(367).

    >>> import torch
    >>> class Descent:
    ...     def init(self, params):
    ...         return ()
    ...     def update(self, updates, state, *, params=None, inplace=True):
    ...         return updates.mul_(-0.5) if inplace else -0.5 * updates, state
    >>> optimizer, grads = from_torchopt(Descent()), torch.ones(1)
    >>> optimizer.update(grads, optimizer.init(grads), grads)[0], grads
    (tensor([-0.5000]), tensor([1.]))
    """
    if isinstance(transform, type) or not all(
        callable(getattr(transform, name, None)) for name in ("init", "update")
    ):
        raise TypeError(
            f"Expected transform to have init and update, got {transform!r}. "
            "Make one, such as torchopt.adam(1e-3)."
        )

    def update(grads: Tree, state: Any, params: Params) -> tuple[Tree, Any]:
        return transform.update(grads, state, params=params, inplace=False)

    return Optimizer(transform.init, update)


def write_grads(
    parameters: nn.Module | Mapping[str, nn.Parameter], grads: Mapping[str, Tensor]
) -> None:
    """Write released gradients into `.grad`, for `torch.optim` and its schedulers to step on.

    Args:
        parameters: a module, or its parameters by name. Those that require grad each get one.
        grads: noisy gradients by name, of the shapes of their parameters: what `private_grad` and
            `clip_and_noise` return where params is the dict that `functional_loss` makes.

    Guarantees:
        Afterwards `.grad` of each parameter that requires grad is a copy of its gradient, in the
        dtype and on the device of the parameter, and `.grad` of every other one is None: no
        gradient that was there before, and was not private, reaches the optimizer.
        On an error nothing is written.

    Raises:
        ValueError: names are missing or unknown (a frozen parameter's is unknown), or shapes differ.
        TypeError: grads is not a mapping of tensors, or parameters are not by name.

    >>> import torch
    >>> layer = nn.Linear(2, 1)
    >>> write_grads(layer, {"weight": torch.ones(1, 2), "bias": torch.zeros(1)})
    >>> layer.weight.grad
    tensor([[1., 1.]])
    """
    named = dict(parameters.named_parameters()) if isinstance(parameters, nn.Module) else parameters
    for name, tree in (("parameters", named), ("grads", grads)):
        if not isinstance(tree, Mapping) or not all(isinstance(x, Tensor) for x in tree.values()):
            raise TypeError(f"Expected {name} to be tensors by name, got {type(tree).__name__}.")
    wanted = {name for name, p in named.items() if p.requires_grad}
    if missing := sorted(wanted - grads.keys()):
        raise ValueError(
            f"Expected grads for every parameter that requires grad, got none for {missing}. "
            "Freeze the others with requires_grad_(False)."
        )
    if unknown := sorted(grads.keys() - wanted):
        raise ValueError(f"Expected grads for parameters that require grad, got {unknown} besides.")
    for name, grad in grads.items():
        if grad.shape != named[name].shape:
            raise ValueError(
                f"Expected grads[{name!r}] of shape {tuple(named[name].shape)}, got "
                f"{tuple(grad.shape)}. Per-sample gradients are not private: clip_and_noise them."
            )
    for name, p in named.items():
        p.grad = grads[name].detach().to(p.device, p.dtype, copy=True) if name in wanted else None
