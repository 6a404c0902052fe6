"""Names for the types that the public functions share. Nothing here runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor

Tree: TypeAlias = Any
"""A pytree (dicts, lists, tuples, NamedTuples) with tensors for leaves."""

Params: TypeAlias = Tree
"""A pytree of floating-point tensors, without a batch axis."""

Loss: TypeAlias = "Callable[..., Any]"
"""`loss(params, example) -> scalar`, or `loss(params, example, key)` where randomness is drawn."""

Update: TypeAlias = "Callable[[Params, Tree], Params]"
"""`update(params, noisy_grads) -> params`, pure."""


@runtime_checkable
class ClippingRule(Protocol):
    """What decides how much one example's gradient shrinks: norms in, scales out.

    `scales` is pure. It takes the pytree of one example's norms, a 0-d float64 tensor for each leaf of
    the parameters, an upper bound on the true norm, and returns a pytree of the same structure
    with a 0-d scale for each. It is mapped over the batch: it never sees another example. The
    promise: the vector of `scale * norm` over the leaves has L2 norm (L1 norm where `order` is 1)
    at most `sensitivity`.
    """

    @property
    def sensitivity(self) -> float: ...

    @property
    def order(self) -> int: ...

    def scales(self, norms: Tree) -> Tree: ...


Key: TypeAlias = "Tensor"
"""An integer tensor of 8 words of 32 bits: the 256-bit key of a ChaCha20 keystream. A secret."""
