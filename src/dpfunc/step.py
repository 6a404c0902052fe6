"""Algorithm 1 of Abadi et al. 2016 in one place: clip, sum, noise, divide, update.

(The first line of that algorithm, the sample, is the batch: `poisson_batches` makes it from the same
mechanism and the same key.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils import _pytree

from dpfunc import random, trees
from dpfunc.events import StepEvent
from dpfunc.gradients import clip_and_sum, clipped_grad
from dpfunc.mechanism import DPSGD, check_mechanism
from dpfunc.noise import privatize
from dpfunc.optimizers import Optimizer, apply_updates
from dpfunc.sampling import Batch
from dpfunc.typing import Key, Loss, Params, Tree, Update


@dataclass(frozen=True, slots=True)
class PartialEvent:
    """The event of a step whose noise multiplier was a tensor: all but that number.

    >>> mechanism = DPSGD(clipping=1.0, noise_multiplier=1.0, sampling_prob=0.1, expected_batch_size=2)
    >>> PartialEvent(mechanism).complete(noise_multiplier=0.7).noise_multiplier
    0.7
    """

    mechanism: DPSGD

    def complete(self, *, noise_multiplier: float) -> StepEvent:
        """The event, for whoever knows the number that the tensor held."""
        return replace(self.mechanism.event(), noise_multiplier=noise_multiplier)


# Events are constants to torch's transforms, so that vmap(dp_step) may return them as they are.
_pytree.register_constant(StepEvent)
_pytree.register_constant(PartialEvent)


def clip_and_noise(grads: Tree, key: Key, mechanism: DPSGD, *, mask: Tensor | None = None) -> Tree:
    """Make a private mean gradient from per-sample gradients: clip, sum, noise, divide.

    Args:
        grads: per-sample gradients, every leaf (B, *s), floating point; B may be 0.
        key: of this release alone. Two releases under one key share their noise, and the
            difference of the two has none: `fold_in` the step.
        mechanism: clipping, noise multiplier and divisor.
        mask: (B,) bool, False for padding.

    Returns:
        Leaves (*s,), float32 at least: (clipped sum + noise) / expected_batch_size.

    Guarantees:
        Those of `clip_and_sum` and of `privatize`. B = 0 gives noise alone.

    Raises:
        ValueError, TypeError: as `clip_and_sum`.

    Source: Abadi et al. 2016, arXiv:1607.00133, Algorithm 1.

    >>> import torch
    >>> mechanism = DPSGD(clipping=1.0, noise_multiplier=1.0, sampling_prob=0.1, expected_batch_size=2)
    >>> clip_and_noise({"w": torch.ones(3, 4)}, random.key(0), mechanism)["w"].shape
    torch.Size([4])
    """
    check_mechanism(mechanism)
    total = clip_and_sum(grads, mechanism.clipping, mask=mask).sum
    return privatize(total, key, mechanism)


def private_grad(
    loss: Loss,
    mechanism: DPSGD,
    *,
    method: str = "auto",
    chunk_size: int | None = None,
    has_key: bool = False,
    randomness: str = "error",
) -> Callable[..., Tree]:
    """Turn the loss of one example into a private mean gradient: the release point.

    Args:
        loss, has_key, randomness: as for `per_sample_grads`.
        mechanism: the record that the sampler and the accountant read too.
        method, chunk_size: as for `clipped_grad`: how, never what.

    Returns:
        `f(params, batch, key, noise_multiplier=None) -> noisy grads`, leaves float32 at least. key is
        the run's key, the same at every step. noise_multiplier, a 0-d tensor, takes the place of
        the mechanism's number where it changes from step to step or is mapped over by `vmap`.

    Guarantees:
        Pure: the same bits for the same arguments, arguments unchanged, no global generator used
        (with randomness="error").
        Noise, per-example keys and the sampler draw on distinct words of one run key, at every step.
        Noise is a function of (key, step, leaf path): one (key, step) is one release. A second loss,
        model or set of parameters under the same two shares its noise, and the difference of the
        two has none: give it a key of its own, `fold_in(key, i)`, and account for it. On the same
        batch the two are one event (see `make_dp_step`); on a batch of its own it is an event more.
        Nothing raises or changes shape because of the data's values.

    Raises:
        TypeError: batch is not a Batch, or mechanism is not a DPSGD. Others as `clipped_grad`.

    Source: Abadi et al. 2016, arXiv:1607.00133, Algorithm 1.

    >>> import torch
    >>> mechanism = DPSGD(clipping=1.0, noise_multiplier=1.0, sampling_prob=0.1, expected_batch_size=2)
    >>> batch = Batch(torch.ones(4, 3), torch.ones(4, dtype=torch.bool), torch.tensor(0))
    >>> private_grad(lambda w, x: w @ x, mechanism)(torch.zeros(3), batch, random.key(0)).shape
    torch.Size([3])
    """
    check_mechanism(mechanism)
    clipped = clipped_grad(
        loss,
        mechanism.clipping,
        method=method,
        chunk_size=chunk_size,
        has_key=has_key,
        randomness=randomness,
    )

    def f(params: Params, batch: Batch, key: Key, noise_multiplier: Tensor | None = None) -> Tree:
        if not isinstance(batch, Batch):
            raise TypeError(
                f"Expected batch to be a dpfunc.Batch(data, mask, step), got {type(batch).__name__}."
            )
        if not isinstance(batch.step, (int, Tensor)):
            raise TypeError(f"Expected batch.step to be a 0-d int tensor, got {batch.step!r}.")
        loss_key = random.derive(key, random.LOSS, batch.step) if has_key else None
        total = clipped(params, batch.data, mask=batch.mask, key=loss_key).sum
        noise_key = random.derive(key, random.NOISE, batch.step)
        return privatize(total, noise_key, mechanism, noise_multiplier)

    return f


def make_dp_step(
    loss: Loss, mechanism: DPSGD, update: Update, **options: Any
) -> Callable[..., tuple[Params, Any]]:
    """Make one step of private training.

    Args:
        loss: `loss(params, example) -> scalar`.
        mechanism: the record that the sampler and the accountant read too.
        update: `update(params, noisy_grads) -> params`, pure; everything it does is post-processing.
        options: method, chunk_size, has_key, randomness, as for `private_grad`.

    Returns:
        `dp_step(params, batch, key, noise_multiplier=None) -> (params, event)`. Pass the run's key,
        the same every time: the step folds in `batch.step`, and one (key, step) is one release
        (see `private_grad`). Append the event to the log. With a
        noise_multiplier (a 0-d tensor) it is a PartialEvent, which a log refuses until the caller,
        who knows the number, has completed it.

    Guarantees:
        Those of `private_grad`. `torch.compile(dp_step, fullgraph=True)` takes it whole, one graph
        for each padded size; compiled equals eager up to rounding.
        `vmap` over keys, parameters and noise multipliers works. Map over keys too: two multipliers
        under one key share their noise, and the sum without noise is their combination. Replicas on
        one batch are queries on one draw: if more than one is released, or the best of them, they
        are one event with noise multiplier (sum of multiplier**-2) ** -1/2.

    Raises:
        ValueError, TypeError: as `private_grad`.

    Source: Abadi et al. 2016, arXiv:1607.00133, Algorithm 1.

    >>> import torch
    >>> mechanism = DPSGD(clipping=1.0, noise_multiplier=1.0, sampling_prob=0.1, expected_batch_size=2)
    >>> dp_step = make_dp_step(lambda w, x: w @ x, mechanism, lambda w, g: w - 0.1 * g)
    >>> batch = Batch(torch.ones(4, 3), torch.ones(4, dtype=torch.bool), torch.tensor(0))
    >>> params, event = dp_step(torch.zeros(3), batch, random.key(0))
    >>> event.noise_multiplier
    1.0
    """
    gradient = private_grad(loss, mechanism, **options)
    event, partial = mechanism.event(), PartialEvent(mechanism)

    def dp_step(
        params: Params, batch: Batch, key: Key, noise_multiplier: Tensor | None = None
    ) -> tuple[Params, StepEvent | PartialEvent]:
        params = trees.map(Tensor.detach, params)  # or a graph would grow from step to step
        stepped = update(params, gradient(params, batch, key, noise_multiplier))
        if stepped is None:
            raise TypeError("Expected update to return the new params, got None.")
        return stepped, event if noise_multiplier is None else partial

    return dp_step


class TrainState(NamedTuple):
    """What the next step needs."""

    params: Params
    optimizer: Any


def make_train_step(
    loss: Loss, mechanism: DPSGD, optimizer: Optimizer, **options: Any
) -> tuple[Callable[[Params], TrainState], Callable[..., Any]]:
    """Make one step of private training with an optimizer that keeps state.

    Args:
        loss, mechanism, options: as for `make_dp_step`.
        optimizer: an (init, update) pair, as `dpfunc.optimizers` makes them.

    Returns:
        `(init, step)`: `init(params) -> TrainState`, and `step(state, batch, key,
        noise_multiplier=None) -> (state, event)`, as for `make_dp_step`.

    Guarantees:
        Those of `make_dp_step`: the optimizer sees the noisy gradient alone.

    Raises:
        ValueError, TypeError: as `private_grad`.

    Source: Abadi et al. 2016, arXiv:1607.00133, Algorithm 1.

    >>> from dpfunc.optimizers import sgd
    >>> import torch
    >>> mechanism = DPSGD(clipping=1.0, noise_multiplier=1.0, sampling_prob=0.1, expected_batch_size=2)
    >>> init, step = make_train_step(lambda w, x: w @ x, mechanism, sgd(0.1, momentum=0.9))
    >>> batch = Batch(torch.ones(4, 3), torch.ones(4, dtype=torch.bool), torch.tensor(0))
    >>> state, event = step(init(torch.zeros(3)), batch, random.key(0))
    >>> state.params.shape
    torch.Size([3])
    """

    if isinstance(optimizer, type) or not all(
        callable(getattr(optimizer, name, None)) for name in ("init", "update")
    ):
        raise TypeError(
            f"Expected optimizer to be an (init, update) pair, got {optimizer!r}. "
            "Make one with dpfunc.optimizers, such as sgd(0.1)."
        )

    def update(state: TrainState, grads: Tree) -> TrainState:
        updates, inner = optimizer.update(grads, state.optimizer, state.params)
        return TrainState(apply_updates(state.params, updates), inner)

    gradient = private_grad(loss, mechanism, **options)
    event, partial = mechanism.event(), PartialEvent(mechanism)

    def init(params: Params) -> TrainState:
        trees.check_floating(params, "params", "Integers have no gradient.")
        params = trees.map(Tensor.detach, params)
        return TrainState(params, optimizer.init(params))

    def step(
        state: TrainState, batch: Batch, key: Key, noise_multiplier: Tensor | None = None
    ) -> tuple[TrainState, StepEvent | PartialEvent]:
        if not isinstance(state, TrainState):
            raise TypeError(
                f"Expected state to be what init(params) made, got {type(state).__name__}."
            )
        stepped = update(state, gradient(state.params, batch, key, noise_multiplier))
        return stepped, event if noise_multiplier is None else partial

    return init, step
