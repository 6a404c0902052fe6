"""Steps: a release, then an update by it, with the event that says what was released."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree

from dpfunc import trees
from dpfunc.events import StepEvent
from dpfunc.mechanism import DPSGD
from dpfunc.optimizers import Optimizer, apply_updates
from dpfunc.sampling import Batch
from dpfunc.step.asked import States, initial_states
from dpfunc.step.release import private_grad, whole_release
from dpfunc.typing import Key, Loss, Params, Update


@dataclass(frozen=True, slots=True)
class PartialEvent:
    """The event of a step some of whose numbers are not known inside a graph.

    They are the noise multiplier, where it was a tensor, and the step, where the mechanism has schedules.

    >>> mechanism = DPSGD(clipping=1.0, noise_multiplier=1.0, sampling_prob=0.1, expected_batch_size=2)
    >>> PartialEvent(mechanism).complete(noise_multiplier=0.7).noise_multiplier
    0.7
    """

    mechanism: DPSGD
    by_tensor: bool = True
    """Whether the noise multiplier was a tensor."""

    def complete(
        self, *, noise_multiplier: float | None = None, step: int | Tensor | None = None
    ) -> StepEvent:
        """The event, for whoever knows the number that the tensor held, or the step: `batch.step`.

        Raises:
            TypeError: a number where none was given as a tensor, or none where one was.
        """
        if self.by_tensor != (noise_multiplier is not None):
            raise TypeError(
                "Expected noise_multiplier= where the step got one as a tensor, and only there, got "
                f"{noise_multiplier} for a step that {'did' if self.by_tensor else 'did not'}."
            )
        mechanism = self.mechanism
        if noise_multiplier is not None:
            mechanism = replace(mechanism, noise_multiplier=noise_multiplier)
        return mechanism.event(step)  # pyright: ignore[reportArgumentType]


# Events are constants to torch's transforms, so that vmap(dp_step) may return them as they are.
_pytree.register_constant(StepEvent)
_pytree.register_constant(PartialEvent)


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

    >>> from dpfunc import random
    >>> mechanism = DPSGD(clipping=1.0, noise_multiplier=1.0, sampling_prob=0.1, expected_batch_size=2)
    >>> dp_step = make_dp_step(lambda w, x: w @ x, mechanism, lambda w, g: w - 0.1 * g)
    >>> batch = Batch(torch.ones(4, 3), torch.ones(4, dtype=torch.bool), torch.tensor(0))
    >>> params, event = dp_step(torch.zeros(3), batch, random.key(0))
    >>> event.noise_multiplier
    1.0
    """
    gradient = private_grad(loss, mechanism, **options)
    event_of = _events(mechanism)

    def dp_step(
        params: Params, batch: Batch, key: Key, noise_multiplier: Tensor | None = None
    ) -> tuple[Params, StepEvent | PartialEvent]:
        params = trees.map(Tensor.detach, params)  # or a graph would grow from step to step
        stepped = update(params, gradient(params, batch, key, noise_multiplier))
        if stepped is None:
            raise TypeError("Expected update to return the new params, got None.")
        return stepped, event_of(noise_multiplier)

    return dp_step


def _events(mechanism: DPSGD) -> Callable[[Tensor | None], StepEvent | PartialEvent]:
    partial = PartialEvent(mechanism)
    scheduled = mechanism.is_scheduled
    event = PartialEvent(mechanism, by_tensor=False) if scheduled else mechanism.event()
    return lambda noise_multiplier: event if noise_multiplier is None else partial


class TrainState(NamedTuple):
    """What the next step needs. Nothing of it is private: it is made of noisy releases."""

    params: Params
    optimizer: Any
    mechanism: States = {}  # noqa: RUF012  (never written to)
    """The state of every query by its name, a 0-d tensor: telemetry, and the adaptive clip norm."""
    step: Tensor | int = 0
    """0-d int64: how many steps were made."""


def make_train_step(
    loss: Loss, mechanism: DPSGD, optimizer: Optimizer, **options: Any
) -> tuple[Callable[[Params], TrainState], Callable[..., Any]]:
    """Make one step of private training with an optimizer, and queries, that keep state.

    Args:
        loss, mechanism, options: as for `make_dp_step`. The mechanism may have telemetry and
            `AdaptiveClipping`.
        optimizer: an (init, update) pair, as `dpfunc.optimizers` makes them.

    Returns:
        `(init, step)`: `init(params) -> TrainState`, and `step(state, batch, key,
        noise_multiplier=None) -> (state, event)`, as for `make_dp_step`. What telemetry released at
        the step is in `state.mechanism`, by the names of the queries.

    Guarantees:
        Those of `make_dp_step`: the optimizer sees the noisy gradient alone.
        The gradient and all queries of a step are one event, of their combined noise multiplier.
        A step clips at the clip norm it was given; the one that adapts to it is the next step's.

    Raises:
        ValueError, TypeError: as `private_grad`.

    Source: Abadi et al. 2016, arXiv:1607.00133, Algorithm 1; Andrew et al. 2021, arXiv:1905.03871.

    >>> from dpfunc.optimizers import sgd
    >>> from dpfunc import random
    >>> mechanism = DPSGD(clipping=1.0, noise_multiplier=1.0, sampling_prob=0.1, expected_batch_size=2)
    >>> init, step = make_train_step(lambda w, x: w @ x, mechanism, sgd(0.1, momentum=0.9))
    >>> batch = Batch(torch.ones(4, 3), torch.ones(4, dtype=torch.bool), torch.tensor(0))
    >>> state, event = step(init(torch.zeros(3)), batch, random.key(0))
    >>> state.params.shape, int(state.step)
    (torch.Size([3]), 1)
    """

    if isinstance(optimizer, type) or not all(
        callable(getattr(optimizer, name, None)) for name in ("init", "update")
    ):
        raise TypeError(
            f"Expected optimizer to be an (init, update) pair, got {optimizer!r}. "
            "Make one with dpfunc.optimizers, such as sgd(0.1)."
        )
    release = whole_release(loss, mechanism, **options)
    event_of = _events(mechanism)

    def init(params: Params) -> TrainState:
        trees.check_floating(params, "params", "Integers have no gradient.")
        params = trees.map(Tensor.detach, params)
        return TrainState(
            params,
            optimizer.init(params),
            initial_states(mechanism, params),
            torch.zeros((), dtype=torch.int64, device=trees.leaves(params)[0].device),
        )

    def step(
        state: TrainState, batch: Batch, key: Key, noise_multiplier: Tensor | None = None
    ) -> tuple[TrainState, StepEvent | PartialEvent]:
        if not isinstance(state, TrainState):
            raise TypeError(
                f"Expected state to be what init(params) made, got {type(state).__name__}."
            )
        grads, states = release(state.params, batch, key, state.mechanism, noise_multiplier)
        updates, inner = optimizer.update(grads, state.optimizer, state.params)
        params = apply_updates(state.params, updates)
        return TrainState(params, inner, states, state.step + 1), event_of(noise_multiplier)

    step.randomness = options.get("randomness", "error")  # pyright: ignore[reportFunctionMemberAccess]
    return init, step
