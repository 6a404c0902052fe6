"""Laws of releases: Algorithm 1 and nothing else, noise of their own, an event that is true.

A release is `gradient(params, batch, key) -> noisy grads`, as `private_grad` makes it, or yours.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any, TypeAlias

import torch
from torch import Tensor

from dpfunc import random, trees
from dpfunc.events import StepEvent
from dpfunc.gradients import clip_and_sum
from dpfunc.mechanism import DPSGD
from dpfunc.sampling import Batch
from dpfunc.testing.laws.exact import ROUNDOFF, distance, exact_norm, promise, same_bits, without
from dpfunc.testing.laws.noise import numbers_follow, streams_are_independent
from dpfunc.typing import Key, Loss, Params, Tree

Gradient: TypeAlias = Callable[..., Tree]
"""`gradient(params, batch, key) -> noisy grads`."""


def release_is_the_mean(
    gradient: Gradient,
    loss: Loss,
    params: Params,
    batch: Batch,
    key: Key,
    mechanism: DPSGD,
    *,
    rtol: float = 2e-4,
) -> None:
    """Under its noise a release is Algorithm 1: clip each example, add up, divide by the public number.

    Args:
        gradient: the release under test.
        loss: of one example, for a float64 loop.
        params, batch, key: what to call it with; examples with mask False are padding.
        mechanism: clipping and divisor, without adaptive clipping.
        rtol: relative to the norm of all contributions that do not cancel.

    Raises:
        AssertionError: without its noise, that of a batch of padding, the release is another number.

    >>> from dpfunc import private_grad
    >>> mechanism = DPSGD(clipping=1.0, noise_multiplier=1.0, sampling_prob=0.1, expected_batch_size=2)
    >>> loss, batch = lambda w, x: w @ x, Batch(torch.eye(3), torch.ones(3) > 0, torch.tensor(0))
    >>> gradient = private_grad(loss, mechanism)
    >>> release_is_the_mean(gradient, loss, torch.zeros(3), batch, random.key(0), mechanism)
    """
    factor = 1.0 if mechanism.factor is None else mechanism.factor(int(batch.step))
    wide, data = trees.map(_wide, (params, batch.data))
    total, size = trees.map(lambda leaf: torch.zeros_like(leaf), wide), 0.0
    for row in torch.nonzero(batch.mask).flatten().tolist():
        grad = torch.func.grad(loss)(wide, trees.map(lambda leaf, i=row: leaf[i], data))
        grad = trees.map(lambda leaf: leaf.unsqueeze(0) / factor, grad)
        added = clip_and_sum(grad, mechanism.rule).sum
        total, size = trees.map(torch.add, total, added), size + exact_norm(added)
    wanted = trees.map(lambda leaf: leaf * factor / mechanism.divisor, total)
    noise, noisy = gradient(params, blank(batch), key), gradient(params, batch, key)
    signal = trees.map(lambda a, b: a.double() - b.double(), noisy, noise)
    off = distance(signal, wanted)
    rounding = 4 * ROUNDOFF * (exact_norm(noisy) + exact_norm(noise))
    if not off <= rtol * size * factor / mechanism.divisor + rounding:
        raise AssertionError(f"under the noise lies {signal!r}, where {wanted!r} was expected")


def released_neighbours_are_close(
    gradient: Gradient,
    params: Params,
    batch: Batch,
    key: Key,
    mechanism: DPSGD,
    *,
    rtol: float = 1e-4,
) -> None:
    """Under one key, removing any example moves the release by at most sensitivity / divisor.

    Args:
        gradient: the release under test.
        params, batch, key: what to call it with.
        mechanism: whose clipping bounds it, without adaptive clipping.
        rtol: for what float32 rounds, in the sum too.

    Raises:
        AssertionError: an example moves it by more.

    >>> from dpfunc import private_grad
    >>> mechanism = DPSGD(clipping=1.0, noise_multiplier=1.0, sampling_prob=0.1, expected_batch_size=2)
    >>> batch = Batch(9 * torch.eye(3), torch.ones(3) > 0, torch.tensor(0))
    >>> gradient = private_grad(lambda w, x: w @ x, mechanism)
    >>> released_neighbours_are_close(gradient, torch.zeros(3), batch, random.key(0), mechanism)
    """
    sensitivity, order = promise(mechanism.rule)
    if mechanism.factor is not None:
        sensitivity *= mechanism.factor(int(batch.step))
    whole, num = gradient(params, batch, key), len(batch.mask)
    most = (1 + rtol) * sensitivity / mechanism.divisor + 8 * ROUNDOFF * exact_norm(whole, order)
    for row in torch.nonzero(batch.mask).flatten().tolist():
        mask = batch.mask & without(row, num).to(batch.mask.device)
        moved = distance(whole, gradient(params, batch._replace(mask=mask), key), order)
        if not moved <= most:
            raise AssertionError(
                f"removing example {row} moves the release by {moved!r}, above {most!r}"
            )


def empty_batch_is_noise(gradient: Gradient, params: Params, batch: Batch, key: Key) -> None:
    """A batch of padding and one of no rows release the same: noise, of the structure of any release.

    Args:
        gradient: the release under test.
        params, batch, key: what to call it with.

    Raises:
        AssertionError: the two differ, or structure, shape or format is not that of a whole batch.

    >>> from dpfunc import private_grad
    >>> mechanism = DPSGD(clipping=1.0, noise_multiplier=1.0, sampling_prob=0.1, expected_batch_size=2)
    >>> batch = Batch(torch.eye(3), torch.ones(3) > 0, torch.tensor(0))
    >>> gradient = private_grad(lambda w, x: w @ x, mechanism)
    >>> empty_batch_is_noise(gradient, torch.zeros(3), batch, random.key(0))
    """
    noise = gradient(params, blank(batch), key)
    none = Batch(trees.rows(batch.data, 0, 0), batch.mask[:0], batch.step)
    try:
        empty = gradient(params, none, key)
    except (RuntimeError, ValueError) as error:
        raise AssertionError(f"an empty batch is refused: {error}") from error
    whole = gradient(params, batch, key)
    if not same_bits(noise, empty):
        raise AssertionError(f"no rows release {empty!r}, padding {noise!r}")
    alike = trees.map(lambda a, b: a.shape == b.shape and a.dtype == b.dtype, whole, noise)
    if not all(trees.leaves(alike)):
        raise AssertionError(f"noise {noise!r} is not of the form of a release, {whole!r}")


def event_tells_the_noise(
    gradient: Gradient,
    params: Params,
    batch: Batch,
    key: Key,
    mechanism: DPSGD,
    *,
    event: StepEvent | None = None,
    error_rate: float = 1e-6,
) -> None:
    """The noise in a release has the scale that the event claims, times sensitivity over divisor.

    Args:
        gradient: the release under test.
        params: with some 10 000 numbers together, that a tenth may be seen.
        batch, key: what to call it with; all of the batch is masked.
        mechanism: Gaussian or Laplace, without queries beside the gradient or noise per group.
        event: what was logged; None is `mechanism.event` of the batch's step.
        error_rate: as for `numbers_follow`, which is asked: with 20 000 numbers 10 % off passes with
            probability below 1e-9.

    Raises:
        AssertionError: the noise has another scale or another law.

    >>> from dpfunc import private_grad
    >>> mechanism = DPSGD(clipping=1.0, noise_multiplier=1.0, sampling_prob=0.1, expected_batch_size=2)
    >>> batch = Batch(torch.ones(3, 10_000), torch.ones(3) > 0, torch.tensor(0))
    >>> gradient = private_grad(lambda w, x: w @ x, mechanism)
    >>> event_tells_the_noise(gradient, torch.zeros(10_000), batch, random.key(0), mechanism)
    """
    event = mechanism.event(int(batch.step)) if event is None else event
    factor = 1.0 if mechanism.factor is None else mechanism.factor(int(batch.step))
    noise = gradient(params, blank(batch), key)
    together = torch.cat([leaf.double().flatten() for leaf in trees.leaves(noise)])
    scale = event.noise_multiplier * mechanism.sensitivity * factor / mechanism.divisor
    numbers_follow(together, scale, law=mechanism.mechanism, error_rate=error_rate)


def noise_is_fresh(
    gradient: Gradient, params: Params, batch: Batch, key: Key, *, error_rate: float = 1e-6
) -> None:
    """Every leaf, step, key and rank of a run has noise of its own.

    Args:
        gradient: the release under test.
        params: leaves of 8 numbers at least are looked at.
        batch, key: what to call it with; all of the batch is masked. Ranks fold theirs into the key.
        error_rate: as for `streams_are_independent`, which is asked.

    Raises:
        AssertionError: two of them share numbers, or are correlated.

    >>> from dpfunc import private_grad
    >>> mechanism = DPSGD(clipping=1.0, noise_multiplier=1.0, sampling_prob=0.1, expected_batch_size=2)
    >>> batch = Batch(torch.ones(3, 1000), torch.ones(3) > 0, torch.tensor(0))
    >>> gradient = private_grad(lambda w, x: w @ x, mechanism)
    >>> noise_is_fresh(gradient, torch.zeros(1000), batch, random.key(0))
    """
    nobody, streams = blank(batch), {}
    keys = {"key": key} | {f"rank {i}": random.fold_in(key, i) for i in range(2)}
    for name, each in keys.items():
        for step in (0, 1, 2, 2**31):
            at = nobody._replace(step=torch.full_like(batch.step, step))
            noise = gradient(params, at, each)
            for path, leaf in trees.named_leaves(noise, "leaf"):
                streams[f"{path} of step {step} of {name}"] = leaf
    streams_are_independent(streams, error_rate=error_rate)


def queries_are_one_event(
    mechanism: DPSGD, *, event: StepEvent | None = None, step: int | None = None
) -> None:
    """An event accounts for the gradient and for every query on the same draw: as one, and not for less.

    Args:
        mechanism: Gaussian, with telemetry or adaptive clipping, or with neither.
        event: what is logged for a step; None is `mechanism.event(step)`.
        step: whose numbers a schedule has.

    Raises:
        AssertionError: the event's multiplier is above (sum of noise_multiplier ** -2) ** -1/2, in exact
            arithmetic, or below it by more than rounding.

    >>> from dpfunc import ClipFraction
    >>> queries_are_one_event(DPSGD(clipping=1.0, noise_multiplier=1.0, sampling_prob=0.1,
    ...     expected_batch_size=2, telemetry=(ClipFraction(noise_multiplier=20.0),)))
    """
    event = mechanism.event(step) if event is None else event
    own: Any = mechanism.noise_multiplier
    own = own(step or 0) if callable(own) else own
    known = [own, *(query.noise_multiplier for query in mechanism.queries)]
    if min(known) == 0.0 or event.noise_multiplier == 0.0:
        held = event.noise_multiplier == min(known)
    else:
        total = sum(1 / Fraction(m) ** 2 for m in known)
        share = total * Fraction(event.noise_multiplier) ** 2
        held = 1 - Fraction(1, 10**12) <= share <= 1
    if not held:
        raise AssertionError(
            f"queries with noise multipliers {known} on one draw are logged as {event.noise_multiplier!r}"
        )


def blank(batch: Batch) -> Batch:
    """The batch with every example masked: its release is noise alone.

    Args:
        batch: any.

    >>> blank(Batch(torch.eye(2), torch.ones(2) > 0, torch.tensor(0))).mask
    tensor([False, False])
    """
    return batch._replace(mask=torch.zeros_like(batch.mask))


def _wide(leaf: Tensor) -> Tensor:
    return leaf.double() if leaf.is_floating_point() else leaf
