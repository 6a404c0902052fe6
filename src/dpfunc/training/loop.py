"""`train`: the ten lines of a training loop as a generator over its steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from dpfunc.events import StepEvent
from dpfunc.mechanism import DPSGD, check_mechanism
from dpfunc.sampling import Batch
from dpfunc.step import PartialEvent, TrainState
from dpfunc.typing import Key


class Trained(NamedTuple):
    """What a step made."""

    state: TrainState
    event: StepEvent
    metrics: dict[str, float]
    """What telemetry released at this step, by the names of the queries."""


def train(
    step: Callable[..., tuple[TrainState, Any]],
    state: TrainState,
    batches: Iterable[Batch],
    key: Key,
    mechanism: DPSGD,
) -> Iterator[Trained]:
    """Fold a step over batches, handing back the state, the event and the metrics of each.

    It is no more than this loop, which may as well be your own:

        for batch in batches:
            state, _ = step(state, batch, key)
            log = append(log, mechanism.event(batch.step))

    Args:
        step: from `make_train_step`, or compiled.
        state: to begin with: `init(params)`, or that of a checkpoint.
        batches: those of `poisson_batches`, from the same mechanism and key.
        key: the run's key, the same at every step.
        mechanism: the record that step and batches were made from.

    Returns:
        Iterator over `Trained(state, event, metrics)`, one for each batch.

    Guarantees:
        The event is that of the step's own number, schedules included, and of the mechanism that
        the step was made from. A batch is taken once: under one key it is one release.
        Nothing runs ahead: step t is computed when its result is asked for.

    Raises:
        TypeError: mechanism is no DPSGD. ValueError: a batch of another step than the state's, or a
            step of another mechanism. Others as `step`.

    Source: Abadi et al. 2016, arXiv:1607.00133, Algorithm 1.

    >>> import torch
    >>> from dpfunc import DPSGD, make_train_step, optimizers, poisson_batches, random
    >>> mechanism = DPSGD(clipping=1.0, noise_multiplier=1.0, sampling_prob=0.5, expected_batch_size=4)
    >>> init, step = make_train_step(lambda w, x: w @ x, mechanism, optimizers.sgd(0.1))
    >>> key = random.key(0)
    >>> batches = poisson_batches(torch.ones(8, 3), key, mechanism, num_steps=5)
    >>> [int(done.state.step) for done in train(step, init(torch.zeros(3)), batches, key, mechanism)]
    [1, 2, 3, 4, 5]
    """
    check_mechanism(mechanism)

    def steps(state: TrainState) -> Iterator[Trained]:
        for batch in batches:
            if int(batch.step) != int(state.step):
                raise ValueError(
                    f"Expected the batch of step {int(state.step)}, got that of {int(batch.step)}. Every step "
                    "is a draw, and a release, of its own: no batch comes twice."
                )
            state, event = step(state, batch, key)
            ran = (
                event.mechanism.event(int(batch.step)) if isinstance(event, PartialEvent) else event
            )
            if ran != mechanism.event(int(batch.step)):
                raise ValueError(
                    f"Expected a step of this mechanism, whose event is {mechanism.event(int(batch.step))}, got "
                    f"one that released {ran}."
                )
            metrics = {name: value.item() for name, value in state.mechanism.items()}
            yield Trained(state, ran, metrics)

    return steps(state)
