"""Per-sample gradients: `vmap(grad(loss))`, with its traps closed."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from dpfunc import _checks, random, trees
from dpfunc.typing import Key, Loss, Tree

RANDOMNESS = ("error", "different", "same")
_BRANCH = (
    "Expected a loss whose operations do not depend on the values of tensors, got a branch or an "
    ".item(){place}. Use torch.where in place of if, and shapes in place of .item()."
)
_TOLD_APART = (
    (
        "randomness",
        "Expected a loss that draws nothing from torch's global generator (randomness='error'), got a "
        "random operation{place}. For a module with dropout: functional_loss(..., has_key=True), and "
        "has_key=True here.",
    ),
    ("data-dependent", _BRANCH),
    ("DataDependent", _BRANCH),
    (
        "in-place",
        "Expected a loss that changes nothing outside it, got an in-place write to a tensor that it "
        "closes over{place} (running statistics?). Freeze the layer with .eval(), or return the new "
        "value with has_aux=True.",
    ),
    (
        "saved tensor hooks",
        "Expected a loss without activation checkpointing, got a checkpoint{place}: torch.func cannot "
        "differentiate it. To bound memory use chunk_size.",
    ),
)
"""What torch's errors contain, and what to say in their place."""


def per_sample_grads(
    loss: Loss,
    *,
    has_aux: bool = False,
    has_key: bool = False,
    randomness: str = "error",
    chunk_size: int | None = None,
    batch_axes: Tree = 0,
) -> Callable[..., Any]:
    """Turn the loss of one example into the gradients of a batch of them.

    Args:
        loss: `loss(params, example) -> scalar`; an example is the data with the batch axis removed.
            With has_aux it returns `(scalar, aux)`, aux a pytree of tensors; with has_key it is
            called as `loss(params, example, key)`.
        has_aux: whether loss returns aux too.
        has_key: whether loss takes a key of its own for each example (dropout, augmentation).
        randomness: what torch's global generator may do inside loss: "error", "different" (draws
            anew for each example) or "same". Prefer has_key: only "error" keeps this a pure function.
        chunk_size: examples differentiated at once, >= 1; None takes all. Bounds the memory of
            activations; the result holds every example's gradient all the same.
        batch_axes: where the batch axis of each leaf of data is: a number for all, or a pytree prefix
            of data with numbers, such as (1, 0) for inputs (T, B, F) and targets (B,).

    Returns:
        `f(params, data, *, key=None) -> grads`, or `-> (grads, aux)` with has_aux. A leaf of params
        of shape s gives (B, *s); a leaf of aux gains the batch axis. Gradients are PRIVATE.

    Guarantees:
        Row i depends on params, on example i and on i (through the key) alone.
        B = 0 gives leaves of shape (0, *s). params and data are unchanged and no graph is kept.
        The key of example i is `split(key, B)[i]`, whatever the batch, the chunks and the padding.

    Raises:
        TypeError: tensors passed as keywords (vmap does not map them: every example would see the
            whole batch), params that are not floating point, a loss without a scalar result.
        ValueError: leaves of data that disagree on the batch axis, an empty params or data.

    Source: torch.func.vmap and torch.func.grad.

    >>> loss = lambda w, x: (w * x).sum() ** 2
    >>> per_sample_grads(loss)(torch.ones(2), torch.tensor([[1.0, 2.0], [0.0, 1.0]]))
    tensor([[ 6., 12.],
            [ 0.,  2.]])
    """
    batched = batched_grads(loss, has_aux, has_key, randomness, chunk_size)

    def f(params: Tree, data: Tree, *, key: Key | None = None, **unexpected: Any) -> Any:
        refuse_keywords(unexpected)
        data = trees.batch_first(data, batch_axes, "data")
        num = check_arguments(params, data, key, has_key)
        grads, aux = batched(params, data, None if key is None else random.split(key, num))
        return (grads, aux) if has_aux else grads

    return f


def batched_grads(
    loss: Loss, has_aux: bool, has_key: bool, randomness: str, chunk_size: int | None
) -> Callable[[Tree, Tree, Tensor | None], tuple[Tree, Any]]:
    """`f(params, data, keys) -> (grads, aux)`, with one key a row and aux `()` where there is none."""
    if not callable(loss):
        advice = "functional_loss returns a pair: loss, params = functional_loss(...)."
        _refuse("loss to be a function", loss, advice)
    _checks.choice(RANDOMNESS, randomness=randomness)
    if chunk_size is not None:
        _checks.integer(at_least=1, chunk_size=chunk_size)
    in_dims = (None, 0, 0) if has_key else (None, 0)
    batched = vmap(
        grad(checked(loss, has_aux), has_aux=True),
        in_dims,
        randomness=randomness,
        chunk_size=chunk_size,
    )

    def f(params: Tree, data: Tree, keys: Tensor | None) -> tuple[Tree, Any]:
        if trees.batch_size(data, "data") == 0:
            # vmap refuses an empty axis: differentiate one blank example and keep none of it.
            blank = trees.map(lambda leaf: leaf.new_zeros(1, *leaf.shape[1:]), data)
            blank_keys = None if keys is None else keys.new_zeros(1, 8)
            return trees.rows(f(params, blank, blank_keys), 0, 0)
        with torch.no_grad():
            arguments = (data,) if keys is None else (data, keys)
            return batched(trees.map(Tensor.detach, params), *arguments)

    return f


def check_arguments(params: Tree, data: Tree, key: Key | None, has_key: bool) -> int:
    """The batch size, once structure and dtypes are what they should be."""
    trees.check_floating(
        params, "params", "Integers have no gradient: close over them in the loss."
    )
    if has_key and key is None:
        raise ValueError("Expected key= with a loss that takes a key (has_key=True), got None.")
    if key is not None and not has_key:
        raise ValueError("Expected has_key=True where a key is passed, got has_key=False.")
    return trees.batch_size(data, "data")


def refuse_keywords(unexpected: dict[str, Any]) -> None:
    if unexpected:
        raise TypeError(
            f"Expected data in one positional pytree, got keywords {sorted(unexpected)}. vmap does not "
            "map keywords: every example would see the whole tensor. Put them into data, as a dict."
        )


def checked(loss: Loss, has_aux: bool) -> Callable[..., tuple[Tensor, Any]]:
    """The loss, returning (scalar, aux), with what torch and users get wrong told apart."""

    def loss_and_aux(params: Tree, example: Tree, *key: Key) -> tuple[Tensor, Any]:
        try:
            with sdpa_kernel(SDPBackend.MATH):  # the fused kernels run example by example in vmap
                result = loss(params, example, *key)
        except RuntimeError as error:
            seen = f"{type(error).__name__}: {error}"
            for words, message in _TOLD_APART:
                if words in seen:
                    place = module_path(error)
                    raise RuntimeError(message.format(place=place)) from error
            raise
        if has_aux and not (isinstance(result, tuple) and len(result) == 2):
            _refuse("loss to return (scalar, aux) with has_aux=True", result, "")
        value, aux = result if has_aux else (result, ())
        if not isinstance(value, Tensor) or value.ndim != 0 or not value.is_floating_point():
            advice = (
                "It sees one example, without the batch axis: reduce what is left, say with sum()."
            )
            _refuse(
                "loss to return a floating-point scalar (0-d tensor) for one example", value, advice
            )
        return value, aux

    return loss_and_aux


def module_path(error: BaseException) -> str:
    """` in module 'blocks.0.norm' (LayerNorm)`, from the frames of a traceback; empty without one."""
    modules = [
        frame.f_locals["self"]
        for frame, _ in traceback.walk_tb(error.__traceback__)
        if isinstance(frame.f_locals.get("self"), nn.Module)
    ]
    if not modules:
        return ""
    names = {id(module): name for name, module in modules[0].named_modules()}
    return f" in module {names.get(id(modules[-1]), '?')!r} ({type(modules[-1]).__name__})"


def _refuse(expected: str, got: Any, advice: str) -> NoReturn:
    seen = (
        f"{got.dtype} of shape {tuple(got.shape)}"
        if isinstance(got, Tensor)
        else type(got).__name__
    )
    raise TypeError(f"Expected {expected}, got {seen}. {advice}".rstrip())
