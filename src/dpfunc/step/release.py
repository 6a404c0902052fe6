"""One release: clip, sum, noise, divide; with all that is asked of the same batch.

Where clip norms change from step to step, by a schedule or adaptively, gradients are clipped in units of
the step's factor and the release is multiplied by it: sensitivity and noise stay plain numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dpfunc import random
from dpfunc.gradients import Rescaled, as_rule, clipped_sums, sum_by
from dpfunc.mechanism import DPSGD, check_mechanism
from dpfunc.noise import privatize, privatize_queries
from dpfunc.sampling import Batch
from dpfunc.step.asked import States, answers, summed
from dpfunc.step.numbers import numbers_of
from dpfunc.typing import Key, Loss, Params, Tree


class Sums(NamedTuple):
    """What a batch adds up to before noise. PRIVATE."""

    gradient: Tree
    """The clipped sum, over the factor of the step."""
    queries: dict[str, Tensor]
    """The sum of the values of every query, by its name."""


def clip_and_noise(
    grads: Tree,
    key: Key,
    mechanism: DPSGD,
    *,
    mask: Tensor | None = None,
    step: int | Tensor | None = None,
) -> Tree:
    """Make a private mean gradient from per-sample gradients: clip, sum, noise, divide.

    Args:
        grads: per-sample gradients, every leaf (B, *s), floating point; B may be 0.
        key: of this release alone. Two releases under one key share their noise, and the
            difference of the two has none: `fold_in` the step.
        mechanism: clipping, noise multiplier and divisor.
        mask: (B,) bool, False for padding.
        step: whose numbers to take from the mechanism's schedules, where it has some.

    Returns:
        Leaves (*s,), float32 at least: (clipped sum + noise) / expected_batch_size.

    Guarantees:
        Those of `clip_and_sum` and of `privatize`. B = 0 gives noise alone.

    Raises:
        ValueError, TypeError: as `clip_and_sum`; a schedule without a step; queries beside the
            gradient, which `make_train_step` drives.

    Source: Abadi et al. 2016, arXiv:1607.00133, Algorithm 1.

    >>> import torch
    >>> mechanism = DPSGD(clipping=1.0, noise_multiplier=1.0, sampling_prob=0.1, expected_batch_size=2)
    >>> clip_and_noise({"w": torch.ones(3, 4)}, random.key(0), mechanism)["w"].shape
    torch.Size([4])
    """
    check_mechanism(mechanism)
    refuse_queries(mechanism, "clip_and_noise")
    if step is None and (mechanism.factor is not None or mechanism.is_scheduled):
        raise ValueError("Expected step= with a mechanism that has schedules, got None.")
    noise_multiplier, factor = numbers_of(mechanism)(0 if step is None else step, {})
    rule = as_rule(mechanism.rule)
    if factor is not None:
        rule = Rescaled(rule=rule, factor=factor)
    total = sum_by(rule, grads, mask).sum
    return privatize(total, key, mechanism, noise_multiplier, factor)


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
    refuse_queries(mechanism, "private_grad")
    release = whole_release(
        loss,
        mechanism,
        method=method,
        chunk_size=chunk_size,
        has_key=has_key,
        randomness=randomness,
    )

    def f(params: Params, batch: Batch, key: Key, noise_multiplier: Tensor | None = None) -> Tree:
        return release(params, batch, key, {}, noise_multiplier)[0]

    return f


def whole_release(loss: Loss, mechanism: DPSGD, **options: Any) -> Callable[..., Any]:
    """`f(params, batch, key, states, noise_multiplier) -> (noisy grads, states)`, a whole release."""
    sums_of, release = summing(loss, mechanism, **options), releasing(mechanism)

    def f(
        params: Params,
        batch: Batch,
        key: Key,
        states: States,
        noise_multiplier: Tensor | None = None,
    ) -> tuple[Tree, States]:
        check_batch(batch)
        sums = sums_of(params, batch, key, states)
        return release(sums, key, batch.step, states, noise_multiplier)

    return f


def summing(
    loss: Loss, mechanism: DPSGD, *, has_key: bool = False, **options: Any
) -> Callable[..., Sums]:
    """`f(params, batch, key, states, first) -> Sums`: all that is asked of a batch, without noise."""
    check_mechanism(mechanism)
    needs_loss = any(query.needs_loss for query in mechanism.queries)
    sums_of = clipped_sums(
        _with_value(loss) if needs_loss else loss, has_aux=needs_loss, has_key=has_key, **options
    )
    rule, numbers = as_rule(mechanism.rule), numbers_of(mechanism)

    def f(params: Params, batch: Batch, key: Key, states: States, first: int = 0) -> Sums:
        _, factor = numbers(batch.step, states)
        used = rule if factor is None else Rescaled(rule=rule, factor=factor)
        loss_key = random.derive(key, random.LOSS, batch.step) if has_key else None
        found = sums_of(params, batch.data, used, batch.mask, loss_key, first)
        if not mechanism.queries:
            return Sums(found.sum, {})
        unit = torch.ones(()) if factor is None else factor
        clip_norm = mechanism.sensitivity * unit.to(found.norms)
        losses = found.aux if needs_loss else torch.full_like(found.norms, math.nan)
        answered = {
            query.name: answers(query, found.norms, losses, clip_norm, states[query.name])
            for query in mechanism.queries
        }
        return Sums(found.sum, {name: summed(a, batch.mask) for name, a in answered.items()})

    return f


def releasing(mechanism: DPSGD) -> Callable[..., tuple[Tree, States]]:
    """`f(sums, key, step, states, noise_multiplier)`: the noisy gradient, and each query's next state."""
    numbers = numbers_of(mechanism)

    def f(
        sums: Sums, key: Key, step: Tensor, states: States, noise_multiplier: Tensor | None = None
    ) -> tuple[Tree, States]:
        scheduled, factor = numbers(step, states)
        if noise_multiplier is not None and scheduled is not None:
            raise TypeError(
                "Expected no noise_multiplier beside a schedule of them in the mechanism, got both."
            )
        multiplier = scheduled if noise_multiplier is None else noise_multiplier
        noise_key = random.derive(key, random.NOISE, step)
        grads = privatize(sums.gradient, noise_key, mechanism, multiplier, factor)
        if not mechanism.queries:
            return grads, states
        query_key = random.derive(key, random.TELEMETRY, step)
        means = privatize_queries(sums.queries, query_key, mechanism)
        return grads, {q.name: q.update(states[q.name], means[q.name]) for q in mechanism.queries}

    return f


def _with_value(loss: Loss) -> Loss:
    def with_value(*arguments: Any) -> tuple[Any, Any]:
        value = loss(*arguments)
        return value, value

    return with_value


def check_batch(batch: Batch) -> None:
    if not isinstance(batch, Batch):
        raise TypeError(
            f"Expected batch to be a dpfunc.Batch(data, mask, step), got {type(batch).__name__}."
        )
    if not isinstance(batch.step, (int, Tensor)) or getattr(batch.step, "ndim", 0):
        raise TypeError(f"Expected batch.step to be a 0-d int tensor, got {batch.step!r}.")


def refuse_queries(mechanism: DPSGD, name: str) -> None:
    check_mechanism(mechanism)
    if mechanism.queries:
        raise ValueError(
            f"Expected a mechanism without telemetry and adaptive clipping for {name}, which keeps no "
            f"state, got {', '.join(q.name for q in mechanism.queries)}. Use make_train_step."
        )
