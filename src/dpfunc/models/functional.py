"""An `nn.Module` and a criterion as a pure per-example loss and a dict of parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from dpfunc import random, trees
from dpfunc.gradients.layers import expanded
from dpfunc.typing import Key, Loss, Tree


def functional_loss(
    module: nn.Module,
    criterion: Callable[[Any, Tree], Tensor],
    *,
    trainable: Callable[[str], bool] | None = None,
    has_key: bool = False,
    batch_axes: Tree = 0,
) -> tuple[Loss, dict[str, Tensor]]:
    """Turn a module and a criterion into `(loss, params)`, the form every transform here takes.

    Args:
        module: called on a batch of one: an input tensor, a tuple (positional) or a dict (keywords)
            of them. Its mode (train or eval) is the one it has when the loss is called.
        criterion: `criterion(output, target) -> scalar`, both with a batch axis of one.
        trainable: whether the parameter of this name is differentiated. None: those that require
            grad. The others, and the buffers, stay inside the loss.
        has_key: whether the loss takes a key and draws the module's dropout from it.
        batch_axes: where the module and the criterion want the batch axis of (input, target): a number
            for both, or a pytree prefix, such as (1, 0) for a module with batch_first=False.

    Returns:
        loss: `loss(params, (input, target)) -> scalar`, or `loss(params, (input, target), key)`.
        params: copies of the trainable parameters by name, detached.

    Guarantees:
        Missing and unknown names in params are errors, not ignored.
        A tensor that the module holds under several names is one parameter, owned by the first name
        in `module.named_parameters()`; the others follow it.
        With has_key, dropout (`nn.Dropout`, `Dropout1d` to `3d`, `F.dropout`, inside attention too)
        differs over examples, steps and layers and is a function of the key. Other randomness is an
        error.

    Raises:
        ValueError: no parameter is trainable, the module has a BatchNorm that would use the
            statistics of the batch, or (when the loss is called) params has other names.

    Source: torch.func.functional_call.

    >>> loss, params = functional_loss(nn.Linear(3, 2), nn.functional.cross_entropy)
    >>> sorted(params)
    ['bias', 'weight']
    >>> loss(params, (torch.zeros(3), torch.tensor(1))).shape
    torch.Size([])
    """
    _refuse_batch_statistics(module)
    named = dict(module.named_parameters())
    chosen = {
        n for n, p in named.items() if (p.requires_grad if trainable is None else trainable(n))
    }
    if not chosen:
        raise ValueError(
            f"Expected at least one trainable parameter, got none out of {sorted(named)}."
        )
    params = {n: p.detach().clone() for n, p in named.items() if n in chosen}
    frozen = {n: p.detach() for n, p in named.items() if n not in chosen}

    def loss(params: dict[str, Tensor], example: tuple[Tree, Tree], *key: Key) -> Tensor:
        _check_call(params, chosen, example, key, has_key)
        batch = trees.map(lambda leaf: leaf.unsqueeze(0), tuple(example))
        inputs, target = trees.batch_at(batch, batch_axes, "(input, target)")
        args, kwargs = _arguments(inputs)
        tensors = {**frozen, **dict(module.named_buffers()), **params}
        with _KeyedDropout(key[0], []) if has_key else nullcontext():
            output = functional_call(module, tensors, args, kwargs, strict=True)
        return criterion(output, target)

    return loss, params


def _check_call(params: Any, chosen: set[str], example: Any, key: Any, has_key: bool) -> None:
    if not isinstance(params, Mapping):
        raise TypeError(f"Expected params to be a dict by name, got {type(params).__name__}.")
    if set(params) != chosen:
        raise ValueError(f"Expected params with the names {sorted(chosen)}, got {sorted(params)}.")
    if not isinstance(example, (tuple, list)) or len(example) != 2:
        raise TypeError(
            f"Expected an example (input, target), got {type(example).__name__}. "
            "For another form, write loss(params, example) around torch.func.functional_call."
        )
    if len(key) != has_key:
        raise TypeError(
            f"Expected {'a' if has_key else 'no'} key for a loss with {has_key=}. Pass has_key= alike to both."
        )


def _arguments(inputs: Tree) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (inputs if isinstance(inputs, tuple) else (inputs,)), {}


def _refuse_batch_statistics(module: nn.Module) -> None:
    for name, layer in module.named_modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and (
            layer.training or layer.running_mean is None
        ):
            raise ValueError(
                f"Expected no layer that mixes the examples of a batch, got {type(layer).__name__} at "
                f"{name!r} using batch statistics. Use nn.GroupNorm, or freeze it with .eval()."
            )


class _KeyedDropout(TorchFunctionMode):
    """Draw the dropout of the functions called under it from a key, one stream for each call."""

    def __init__(self, key: Key, calls: list[None]) -> None:
        super().__init__()
        self.key = key
        self.calls = calls  # grows by one at each call: a list of its own, which compile can trace

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _SPATIAL_AXES:
            return self._dropout(*args, **kwargs, spatial=_SPATIAL_AXES[func])
        parts = expanded(func)
        if func is F.scaled_dot_product_attention:
            parts = _attention
        if parts is None:
            return func(*args, **kwargs)
        with self:
            return parts(*args, **kwargs)

    def _dropout(
        self,
        x: Tensor,
        p: float = 0.5,
        training: bool = True,
        inplace: bool = False,
        *,
        spatial: int,
    ) -> Tensor:
        del inplace  # would write to a tensor that vmap may share
        if not 0.0 <= p <= 1.0:
            raise ValueError(f"Expected a dropout probability p in [0, 1], got {p}.")
        if not training or p == 0.0:
            return x
        self.calls.append(None)
        # Whole channels for dropout1d, 2d and 3d, which see a batch axis of one.
        shape = x.shape[: x.ndim - spatial] + (1,) * spatial
        call_key = random.derive(self.key, random.DROPOUT, len(self.calls))
        keep = random.uniform(call_key.to(x.device), shape) >= p
        return torch.where(keep, x / (1 - p if p < 1 else 1), 0.0)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`F.scaled_dot_product_attention` with its dropout in the open."""
    if enable_gqa:
        times = query.shape[-3] // key.shape[-3]
        key, value = (x.repeat_interleave(times, -3) for x in (key, value))
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None:
        scores = (
            scores.masked_fill(~attn_mask, -torch.inf)
            if attn_mask.dtype == torch.bool
            else scores + attn_mask
        )
    return F.dropout(scores.softmax(-1), dropout_p) @ value


_SPATIAL_AXES = {F.dropout: 0, F.dropout1d: 1, F.dropout2d: 2, F.dropout3d: 3}
