"""Names for the types that the public functions share. Nothing here runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

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

    A rule may have a method `noise_scales(paths)` too: for the dotted path of each leaf a number that
    takes the place of the sensitivity in the noise of that leaf. The promise then is also that the
    vector of `scale * norm / noise_scale` has norm at most 1.
    """

    @property
    def sensitivity(self) -> float: ...

    @property
    def order(self) -> int: ...

    def scales(self, norms: Tree) -> Tree: ...


class Observed(NamedTuple):
    """What a query may look at: one example, and a public number. PRIVATE."""

    norm: Tensor
    """0-d, float64: the example's gradient norm before clipping, in the order of the rule."""
    loss: Tensor
    """0-d: the example's loss, where some query has `needs_loss`; else NaN."""
    clip_norm: Tensor
    """0-d, float64: the sensitivity of this step's clipped sum, in gradient units. Public."""


@runtime_checkable
class Query(Protocol):
    """A number about a batch that is released beside the gradient, with noise of its own.

    `value` is pure. It sees one example and the public state, and returns a 0-d tensor, which is
    clamped to [-1, 1]; it is mapped over the batch and never sees another example. The noisy sum of
    the values, over the expected batch size, makes the next state. The state is what is reported.
    """

    @property
    def name(self) -> str: ...

    @property
    def noise_multiplier(self) -> float: ...

    @property
    def needs_loss(self) -> bool: ...

    def init(self) -> float: ...

    def value(self, observed: Observed, state: Tensor) -> Tensor: ...

    def update(self, state: Tensor, mean: Tensor) -> Tensor: ...


Key: TypeAlias = "Tensor"
"""An integer tensor of 8 words of 32 bits: the 256-bit key of a ChaCha20 keystream. A secret."""
