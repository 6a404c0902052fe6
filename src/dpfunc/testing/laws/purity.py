"""Laws of any function: pure, without a graph on its result, and the same when it is compiled."""

from __future__ import annotations

import random as python_random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException

from dpfunc import trees
from dpfunc.testing.laws.exact import same_bits


def is_pure(f: Callable[..., Any], *arguments: Any, **named: Any) -> None:
    """The same arguments give the same bits, stay as they are, and no global generator moves.

    Args:
        f: the function under test.
        arguments, named: what to call it with.

    Raises:
        AssertionError: another result at a second call, an argument that was written to, a global
            generator (torch, NumPy or Python) that was drawn from, or a result with a graph behind
            it where no argument has one.

    >>> is_pure(torch.add, torch.ones(2), 1)
    """
    before = trees.map(_cloned, (arguments, named))
    states = _generators()
    first = trees.map(_cloned, f(*arguments, **named))
    second = f(*arguments, **named)
    if not same_bits(first, second):
        raise AssertionError(f"a second call gives {second!r}, the first gave {first!r}")
    if not same_bits(before, (arguments, named)):
        raise AssertionError(f"an argument was written to: {(arguments, named)!r} was {before!r}")
    moved = [name for name, state in _generators().items() if state != states[name]]
    if moved:
        raise AssertionError(f"the global generator of {moved[0]} was drawn from")
    if _with_graph(second) and not _with_graph((arguments, named)):
        raise AssertionError(f"a graph hangs on the result {second!r}")


def keeps_no_graph(f: Callable[..., Any], *arguments: Any, **named: Any) -> None:
    """No graph hangs on the result, even of arguments that ask for one: it would grow from step to step.

    Args:
        f: the function under test.
        arguments, named: what to call it with; floating-point tensors are made to require grad.

    Raises:
        AssertionError: a result requires grad.

    >>> keeps_no_graph(lambda x: x.detach() + 1, torch.ones(2))
    """

    def asking(leaf: Any) -> Any:
        floating = isinstance(leaf, Tensor) and leaf.is_floating_point()
        return leaf.detach().clone().requires_grad_() if floating else leaf

    arguments, named = trees.map(asking, (arguments, named))
    if _with_graph(result := f(*arguments, **named)):
        raise AssertionError(f"a graph hangs on the result {result!r}")


def compiles_alike(
    f: Callable[..., Any],
    *arguments: Any,
    backend: Any = "aot_eager",
    rtol: float = 1e-4,
    atol: float = 1e-6,
) -> None:
    """Compiled to one graph, a function gives what it gives eagerly, up to rounding.

    Args:
        f: the function under test.
        arguments: what to call it with.
        backend: of `torch.compile`.
        rtol, atol: of each number.

    Raises:
        AssertionError: it breaks into several graphs, or its results differ.

    >>> compiles_alike(torch.add, torch.ones(2), torch.ones(2), backend="eager")
    """
    expected = f(*arguments)
    try:
        found = torch.compile(f, fullgraph=True, backend=backend)(*arguments)
    except TorchDynamoException as error:
        raise AssertionError(f"{f!r} does not compile to one graph: {error}") from error
    pairs = zip(trees.leaves(expected), trees.leaves(found), strict=True)
    for a, b in pairs:
        if isinstance(a, Tensor):
            torch.testing.assert_close(b, a, rtol=rtol, atol=atol, equal_nan=True)
        elif a != b:
            raise AssertionError(f"compiled it returns {b!r}, eagerly {a!r}")


def _cloned(leaf: Any) -> Any:
    return leaf.detach().clone() if isinstance(leaf, Tensor) else leaf


def _with_graph(tree: Any) -> bool:
    return any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in trees.leaves(tree))


def _generators() -> dict[str, Any]:
    name, numbers, *place = np.random.get_state()
    return {
        "torch": torch.get_rng_state().tolist(),
        "numpy": (name, bytes(np.asarray(numbers)), *place),
        "python": python_random.getstate(),
    }
