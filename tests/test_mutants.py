"""The test of the tests: each law passes on this library and tells it, or a function, with a bug planted.

A mutant is a name, the law that kills it, how that law is asked, and the bug: a function in place of the one
under test, or patches of this library's own. `ask(law)` uses the library, `ask(law, f)` the function f.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dpfunc import (
    DPSGD,
    Batch,
    ClipFraction,
    FlatClipping,
    L1Clipping,
    PerGroupClipping,
    Schedule,
    StepEvent,
    clip_and_sum,
    clipped_grad,
    delta_bounds,
    epsilon,
    epsilon_bounds,
    make_dp_step,
    per_sample_grads,
    poisson_batches,
    private_grad,
    random,
    trees,
)
from dpfunc.accounting.rdp import rdp
from dpfunc.gradients import Clipped, clipping
from dpfunc.noise import privatize
from dpfunc.sampling import batches, poisson
from dpfunc.testing import laws

KEY = random.key(12)


class Mutant(NamedTuple):
    name: str
    law: str
    ask: Callable[..., None]
    wrong: Callable[..., Any] | None = None
    patches: dict[str, Any] = {}  # noqa: RUF012  (never written to)


# --- clipping


def draws(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=dtype)


SIZES = torch.tensor([1e3, 1.0, 1e-3, 30.0, 0.2])
GRADS = {"a": draws(5, 3) * SIZES[:, None], "b": draws(5, seed=1) * SIZES}
POISON = {"a": GRADS["a"].clone().index_fill_(0, torch.tensor(1), torch.nan), "b": GRADS["b"]}
MASK = torch.tensor([True, False, True, True, False])
WIDE = draws(20, 500) * torch.logspace(-3, 3, 20)[:, None]


def about(grads, clipping=1.0, *arguments):
    """How a law of clipping is asked about these gradients."""

    def ask(law, clip=clip_and_sum):
        law(grads, clipping, *arguments, clip=clip)

    return ask


def each_leaf_apart(self, norms):
    return trees.map(lambda norm: self.l2_clip_norm / norm.clamp(min=self.l2_clip_norm), norms)


def without_root(norms):
    return torch.stack(norms).square().sum(0)


def a_weight_of_zero(leaf, scale, keep):
    return leaf * (scale.to(leaf.dtype) * keep).reshape(-1, *[1] * (leaf.ndim - 1))


def mask_for_the_norms_alone(rule, norms, mask, right=clipping.decide):
    scales, keep, total = right(rule, norms, None)
    return scales, keep, total if mask is None else torch.where(mask, total, 0.0)


def mask_for_the_sum_alone(rule, norms, mask, right=clipping.decide):
    scales, keep, _ = right(rule, norms, mask)
    return scales, keep, right(rule, norms, None)[2].nan_to_num(7.0, 7.0)


def mean_for_sum(rule, grads, mask, right=clipping.sum_by):
    found = right(rule, grads, mask)
    return Clipped(trees.map(lambda leaf: leaf / max(1, len(found.norms)), found.sum), found.norms)


def always_euclidean(leaf, order, size, right=clipping._norm_bound):
    return right(leaf, 2, size)


def rounded_norm(leaf, order, size):
    return torch.linalg.vector_norm(leaf.flatten(1), dim=1).bfloat16().double()


def always_lowered(scale, dtype, most=None):
    return (scale * (1 - 1e-5)).to(dtype)


def never_lowered(scale, dtype, most=None):
    return scale.to(dtype)


def in_this_format(leaf):
    return leaf


def no_room_for_other_groups(self, paths):
    return [self.l2_clip_norms[group] for group in self._groups(paths)]


def norms_of(grads):
    leaves = [leaf.reshape(len(leaf), -1) for leaf in trees.leaves(grads)]
    return torch.cat(leaves, 1).norm(dim=1)


def by_scales(scale):
    """A clip made of scales that may look at the norms of the whole batch."""

    def clip(grads, l2_clip_norm, mask=None):
        norms = norms_of(grads)
        weights = scale(norms, l2_clip_norm)
        weights = weights if mask is None else torch.where(mask, weights, 0.0)
        total = trees.map(lambda leaf: torch.tensordot(weights, leaf, 1), grads)
        return Clipped(total, norms.double())

    return clip


def only_different(grads, l2_clip_norm, mask=None):
    leaf = torch.unique(torch.cat([grads["a"], grads["b"][:, None]], 1), dim=0)
    return clip_and_sum({"a": leaf[:, :3], "b": leaf[:, 3]}, l2_clip_norm, mask=mask)


def mean_times_number(grads, l2_clip_norm, mask=None):
    found = clip_and_sum(grads, l2_clip_norm, mask=mask)
    num = torch.tensor(float(len(found.norms)))
    return Clipped(trees.map(lambda leaf: leaf / num * num, found.sum), found.norms)


def the_sum_is_clipped(grads, l2_clip_norm, mask=None):
    total = clip_and_sum(grads, 1e6, mask=mask)
    one = trees.map(lambda leaf: leaf.unsqueeze(0), total.sum)
    return Clipped(clip_and_sum(one, l2_clip_norm).sum, total.norms)


def later_ones_count_less(grads, l2_clip_norm, mask=None):
    weights = 1 - torch.arange(len(grads["b"])) / 1000
    found = clip_and_sum(grads, l2_clip_norm)
    sums = trees.map(lambda leaf: torch.tensordot(weights, leaf, 1), grads)
    return Clipped(clip_and_sum(trees.map(lambda x: x[None], sums), 1.0).sum, found.norms)


# Three tokens that undo three others but for their last bits, which is what rounding is about.
TOKENS = (
    torch.cat([draws(2, 3, 300), draws(2, 3, 300) * (1 + 1e-7)], 1),
    torch.cat([draws(2, 3, 300, seed=2), -draws(2, 3, 300, seed=2)], 1),
)


def about_tokens(law, make=clipped_grad):
    def loss(params, example):
        return (F.linear(example[0], params) * example[1]).sum()

    law(loss, torch.zeros(300, 300), TOKENS, 1e-6, method="bookkeeping", make=make)


def gram_alone(rows, cols, square, *rest):
    return square.clamp(min=0.0).sqrt()


def network(params, example):
    return torch.tanh(params["w"] @ example).sum() + params["b"].square().sum()


NETWORK = {"w": draws(3, 4), "b": draws(2, seed=3)}


def about_network(law, make=clipped_grad):
    law(network, NETWORK, draws(5, 4, seed=4), 0.5, make=make)


def about_examples(law, make=per_sample_grads):
    law(network, NETWORK, draws(5, 4, seed=4), make=make)


def last_chunk_dropped(loss, clipping, *, chunk_size=None, **options):
    def f(params, data, mask=None):
        whole = len(data) - len(data) % (chunk_size or 1)
        data, mask = data[:whole], None if mask is None else mask[:whole]
        return clipped_grad(loss, clipping, **options)(params, data, mask=mask)

    return f


def padding_differentiated_as_blank(loss, clipping, **options):
    def f(params, data, mask=None):
        mask = torch.ones(len(data), dtype=torch.bool) if mask is None else mask
        data = torch.where(mask[:, None], data, 0.0)
        return clipped_grad(loss, clipping, **options)(params, data)

    return f


def centred(loss):
    def f(params, data):
        grads = per_sample_grads(loss)(params, data)
        return trees.map(lambda leaf: leaf - leaf.mean(0), grads)

    return f


GROUPS = PerGroupClipping(l2_clip_norms={"a": 1.0, "b": 2.0}, noise="per_group")


def about_scales(rule):
    return lambda law: law(GRADS, rule)


CLIPPING = [
    Mutant(
        "per-leaf norms for the global one",
        "scales_keep_the_promise",
        about_scales(FlatClipping(l2_clip_norm=1.0)),
        patches={"dpfunc.gradients.rules.FlatClipping.scales": each_leaf_apart},
    ),
    Mutant(
        "noise per group without room for the other groups",
        "scales_keep_the_promise",
        about_scales(GROUPS),
        patches={"dpfunc.gradients.rules.PerGroupClipping.noise_scales": no_room_for_other_groups},
    ),
    Mutant(
        "a square root forgotten",
        "norms_are_upper_bounds",
        about(GRADS),
        patches={"dpfunc.trees.root_sum_squares": without_root},
    ),
    Mutant(
        "a norm that rounds down",
        "norms_are_upper_bounds",
        about(WIDE),
        patches={"dpfunc.gradients.clipping._norm_bound": rounded_norm},
    ),
    Mutant(
        "a scale without its margin",
        "contribution_is_bounded",
        about(WIDE),
        patches={"dpfunc.gradients.clipping.lowered": never_lowered},
    ),
    Mutant(
        "L2 norms under an L1 rule",
        "contribution_is_bounded",
        about(GRADS, L1Clipping(l1_clip_norm=1.0)),
        patches={"dpfunc.gradients.clipping._norm_bound": always_euclidean},
    ),
    Mutant(
        "float16 that overflows",
        "norms_are_upper_bounds",
        about(torch.full((3, 400), 3e4, dtype=torch.float16)),
        by_scales(lambda norms, bound: (bound / norms).clamp(max=1.0)),
    ),
    Mutant(
        "a sum in float16",
        "sums_add_up",
        about(WIDE.half(), 1.0, 3),
        patches={"dpfunc.gradients.clipping.raised": in_this_format},
    ),
    Mutant(
        "NaN through a weight of 0",
        "poison_vanishes",
        about(POISON),
        patches={"dpfunc.gradients.clipping.scaled": a_weight_of_zero},
    ),
    Mutant(
        "NaN through the weight of a masked row",
        "masked_rows_vanish",
        about(GRADS, 1.0, MASK),
        patches={"dpfunc.gradients.clipping.scaled": a_weight_of_zero},
    ),
    Mutant(
        "a mask for the norms alone",
        "masked_rows_vanish",
        about(GRADS, 1.0, MASK),
        patches={"dpfunc.gradients.clipping.decide": mask_for_the_norms_alone},
    ),
    Mutant(
        "a mask for the sum alone",
        "masked_rows_vanish",
        about(GRADS, 1.0, MASK),
        patches={"dpfunc.gradients.clipping.decide": mask_for_the_sum_alone},
    ),
    Mutant(
        "the mean for the sum",
        "duplicates_count_each",
        about(GRADS),
        patches={"dpfunc.gradients.clipping.sum_by": mean_for_sum},
    ),
    Mutant("duplicates removed", "duplicates_count_each", about(GRADS), only_different),
    Mutant("an empty batch gives NaN", "sums_add_up", about(GRADS, 1.0, 0), mean_times_number),
    Mutant(
        "all scaled by the largest norm",
        "neighbours_are_close",
        about(torch.cat([torch.ones(50, 1), torch.full((1, 1), 50.0)])),
        by_scales(lambda norms, bound: bound / norms.max().expand(len(norms))),
    ),
    Mutant(
        "the sum clipped, and not each",
        "neighbours_are_close",
        about(torch.tensor([[10.0, 0.0], [-30.0, 0.0]])),
        the_sum_is_clipped,
    ),
    Mutant(
        "all scaled by the mean norm",
        "replaced_neighbours_are_close",
        about(GRADS),
        by_scales(lambda norms, bound: bound / norms.nanmean().expand(len(norms))),
    ),
    Mutant(
        "later examples count less", "order_does_not_matter", about(GRADS), later_ones_count_less
    ),
    Mutant(
        "a gradient within the bound is scaled",
        "clipping_is_idempotent",
        about(GRADS),
        patches={"dpfunc.gradients.clipping.lowered": always_lowered},
    ),
    Mutant(
        "a Gram norm without its margin",
        "losses_contribution_is_bounded",
        about_tokens,
        patches={"dpfunc.gradients.layers.outer.bound": gram_alone},
    ),
    Mutant(
        "a weighted sum of unclipped gradients",
        "methods_agree",
        about_network,
        lambda loss, _, **options: clipped_grad(loss, 1e6, **options),
    ),
    Mutant("the last chunk dropped", "chunks_and_padding_agree", about_network, last_chunk_dropped),
    Mutant(
        "padding differentiated as a blank example",
        "chunks_and_padding_agree",
        about_network,
        padding_differentiated_as_blank,
    ),
    Mutant("gradients centred over the batch", "examples_are_apart", about_examples, centred),
]


# --- noise

GAUSSIAN = DPSGD(clipping=0.5, noise_multiplier=3.0, sampling_prob=0.1, expected_batch_size=20)
LAPLACE = replace(GAUSSIAN, clipping=L1Clipping(l1_clip_norm=0.5), mechanism="laplace")
TOTAL = {"a": draws(300), "b": [draws(2, 3, dtype=torch.float64)]}


def about_scale(mechanism=GAUSSIAN):
    return lambda law, release=privatize: law(mechanism, release=release, key=KEY)


def about_streams(law, release=privatize):
    law(GAUSSIAN, release=release, key=KEY, num=2000)


def about_signal(law, release=privatize):
    law(TOTAL, GAUSSIAN, release=release, key=KEY)


def about_purity(law, release=privatize):
    law(release, TOTAL, KEY, GAUSSIAN)


def with_record(**changes):
    """Privatized by another record than the one that is logged."""
    return lambda total, key, mechanism: privatize(total, key, replace(mechanism, **changes))


def with_noise(change):
    """A release whose noise is changed: `change(noise, path)`."""

    def release(total, key, mechanism):
        noise = privatize(trees.map(torch.zeros_like, total), key, mechanism)
        signal = privatize(total, key, replace(mechanism, noise_multiplier=0.0))
        return trees.map(lambda s, n: s + change(n), signal, noise)

    return release


def noise_after_division(total, key, mechanism):
    noise = privatize(total, key, replace(mechanism, expected_batch_size=1))
    return trees.map(lambda n, t: n - t + t / mechanism.divisor, noise, total)


def noise_that_grows_with_the_sum(total, key, mechanism):
    multiplier = mechanism.noise_multiplier * (1 + laws.exact_norm(total))
    return privatize(total, key, replace(mechanism, noise_multiplier=multiplier))


def of_the_global_generator(total, key, mechanism):
    return trees.map(lambda leaf: leaf / 20 + 0.075 * torch.randn_like(leaf), total)


def one_key_for_all_leaves(key, use, data=0, right=random.derive):
    if use != random.LEAF:
        return right(key, use, data)
    return right(key, use, [0]).expand(len(data), 8)


def one_key_for_all_steps(key, use, data=0, right=random.derive):
    return right(key, use, 0 if use == random.NOISE else data)


def leaves_begin_one_later(total, key, mechanism):
    """As if the streams of leaves were one, begun a few words on: they overlap."""
    size = sum(leaf.numel() for leaf in trees.leaves(total)) + 10
    stream = iter(range(0, 40, 10))
    noise = random.normal(random.fold_in(key, 5), (size,))
    return trees.map(lambda leaf: noise[(at := next(stream)) : at + leaf.numel()], total)


NOISE = [
    Mutant(
        "noise 10 % too small",
        "noise_is_calibrated",
        about_scale(),
        with_record(noise_multiplier=2.7),
    ),
    Mutant(
        "noise 10 % too large",
        "noise_is_calibrated",
        about_scale(),
        with_record(noise_multiplier=3.3),
    ),
    Mutant(
        "Laplace noise 10 % too small",
        "noise_is_calibrated",
        about_scale(LAPLACE),
        with_record(noise_multiplier=2.7),
    ),
    Mutant(
        "a scale without the sensitivity",
        "noise_is_calibrated",
        about_scale(),
        with_record(clipping=1.0),
    ),
    Mutant(
        "the variance for the standard deviation",
        "noise_is_calibrated",
        about_scale(),
        with_noise(lambda noise: noise * 1.5),
    ),
    Mutant("noise after the division", "noise_is_calibrated", about_scale(), noise_after_division),
    Mutant(
        "uniform noise of the right variance",
        "noise_is_calibrated",
        about_scale(),
        patches={
            "dpfunc.noise.additive.add_normals": lambda totals, keys, scales: (
                totals + scales * 12**0.5 * (random.uniform(keys[0], totals.shape) - 0.5)
            )
        },
    ),
    Mutant(
        "Laplace noise of standard deviation b",
        "noise_is_calibrated",
        about_scale(LAPLACE),
        with_noise(lambda noise: noise / 2**0.5),
    ),
    Mutant(
        "Gaussian noise for Laplace",
        "noise_is_calibrated",
        about_scale(LAPLACE),
        with_record(mechanism="gaussian"),
    ),
    Mutant(
        "noise drawn in float16",
        "noise_is_calibrated",
        about_scale(),
        with_noise(lambda noise: noise.half().to(noise.dtype)),
    ),
    Mutant(
        "one number for all elements",
        "noise_is_calibrated",
        about_scale(),
        with_noise(lambda noise: noise.flatten()[0].expand(noise.shape)),
    ),
    Mutant(
        "one key for all leaves",
        "noise_is_independent",
        about_streams,
        patches={"dpfunc.random.derive": one_key_for_all_leaves},
    ),
    Mutant(
        "one key for all steps",
        "noise_is_independent",
        about_streams,
        lambda total, key, mechanism: privatize(total, KEY, mechanism),
    ),
    Mutant(
        "one key for all ranks",
        "noise_is_independent",
        about_streams,
        patches={"dpfunc.random.fold_in": lambda key, data: random.derive(key, 2, 0)},
    ),
    Mutant(
        "leaves whose words overlap", "noise_is_independent", about_streams, leaves_begin_one_later
    ),
    Mutant(
        "neighbours that are averaged",
        "noise_is_independent",
        about_streams,
        with_noise(lambda noise: (noise + noise.roll(1)) / 2**0.5),
    ),
    Mutant(
        "a divisor that is one too large",
        "signal_is_kept",
        about_signal,
        with_record(expected_batch_size=21),
    ),
    Mutant(
        "a sum that is not divided",
        "signal_is_kept",
        about_signal,
        with_record(loss_reduction="sum"),
    ),
    Mutant(
        "noise that grows with the sum",
        "signal_is_kept",
        about_signal,
        noise_that_grows_with_the_sum,
    ),
    Mutant("noise of the global generator", "is_pure", about_purity, of_the_global_generator),
]


# --- sampling


@cache
def about_inclusion(sampling_prob=0.3):
    def ask(law, draw=None):
        law(draw or coins(sampling_prob), sampling_prob=sampling_prob)

    return ask


def about_poisson(law):
    law(num_steps=1000)


COINS = np.random.default_rng(3).random((3000, 12))


def coins(prob):
    """A sampler that draws example i with prob[i]."""
    return lambda step: np.flatnonzero(COINS[step] < prob)


def step_forgotten(key, step, right=poisson._keys):
    return right(key, 0)


def with_replacement(step):
    rng = np.random.default_rng(step)
    return np.unique(rng.integers(0, 12, rng.binomial(12, 0.3)))


def shuffled_pass(step):
    """Three batches of four make an epoch, in an order of its own."""
    order = np.random.default_rng(step // 3).permutation(12)
    return order[step % 3 * 4 :][:4]


def blocks(step):
    rng = np.random.default_rng(step)
    return (rng.integers(12) + np.arange(rng.binomial(12, 0.3))) % 12


def never_empty(step):
    return next(
        found
        for attempt in range(100)
        if len(found := np.flatnonzero(np.random.default_rng((step, attempt)).random(12) < 0.1))
    )


def each_batch_twice(step):
    return coins(0.3)(step // 2)


RARE = DPSGD(clipping=1.0, noise_multiplier=1.0, sampling_prob=0.05, expected_batch_size=2)


def about_batches(law, make=poisson_batches):
    law(RARE, make=make, key=KEY)


def without_empty_ones(*arguments, **options):
    return [batch for batch in poisson_batches(*arguments, **options) if batch.mask.any()]


def begun_anew(*arguments, start=0, num_steps):
    for batch in poisson_batches(*arguments, num_steps=num_steps - start):
        yield batch._replace(step=batch.step + start)


def all_real(gather, drawn, right=batches._batch):
    batch = right(gather, drawn)
    return batch._replace(mask=torch.ones_like(batch.mask))


def padded_with_the_first(leaf, size):
    return torch.cat([leaf, leaf.new_ones(size - len(leaf), *leaf.shape[1:])])


SAMPLING = [
    Mutant(
        "batches of a fixed size",
        "inclusion_is_independent",
        about_poisson,
        patches={"dpfunc.sampling.poisson._binomial": lambda key, num, prob: round(num * prob)},
    ),
    Mutant(
        "always the first examples",
        "inclusion_is_independent",
        about_poisson,
        patches={"dpfunc.sampling.poisson._subset": lambda key, num, size: np.arange(size)},
    ),
    Mutant(
        "one key for all steps",
        "inclusion_is_independent",
        about_poisson,
        patches={"dpfunc.sampling.poisson._keys": step_forgotten},
    ),
    Mutant(
        "always the last examples",
        "inclusion_is_independent",
        about_poisson,
        patches={"dpfunc.sampling.poisson._subset": lambda key, num, size: np.arange(num)[-size:]},
    ),
    Mutant(
        "all 10 % more likely",
        "inclusion_is_independent",
        about_inclusion(),
        coins(np.full(12, 0.33)),
    ),
    Mutant(
        "one example 30 % more likely",
        "inclusion_is_independent",
        about_inclusion(),
        coins(np.array([0.39] + [0.3] * 11)),
    ),
    Mutant(
        "the last example never drawn",
        "inclusion_is_independent",
        about_inclusion(),
        coins(np.array([0.3] * 11 + [0.0])),
    ),
    Mutant(
        "examples drawn with replacement",
        "inclusion_is_independent",
        about_inclusion(),
        with_replacement,
    ),
    Mutant(
        "a shuffled pass over the data",
        "inclusion_is_independent",
        about_inclusion(sampling_prob=1 / 3),
        shuffled_pass,
    ),
    Mutant("blocks of neighbours", "inclusion_is_independent", about_inclusion(), blocks),
    Mutant(
        "an empty draw drawn again",
        "inclusion_is_independent",
        about_inclusion(sampling_prob=0.1),
        never_empty,
    ),
    Mutant("each batch twice", "inclusion_is_independent", about_inclusion(), each_batch_twice),
    Mutant("an empty batch dropped", "batches_are_whole", about_batches, without_empty_ones),
    Mutant("a resumed run begun anew", "batches_are_whole", about_batches, begun_anew),
    Mutant(
        "a mask of ones",
        "batches_are_whole",
        about_batches,
        patches={"dpfunc.sampling.batches._batch": all_real},
    ),
    Mutant(
        "padding that is an example",
        "batches_are_whole",
        about_batches,
        patches={"dpfunc.sampling.batches._padded": padded_with_the_first},
    ),
]


# --- accounting

EVENT = StepEvent(noise_multiplier=1.0, sampling_prob=0.1, count=10)
QUIET = replace(EVENT, noise_multiplier=2.0, count=30)


def about_cost(*arguments):
    return lambda law, epsilon=epsilon: law(*arguments, epsilon=epsilon)


def of_events(change):
    """An accountant that takes each event for another."""
    return lambda log, delta: epsilon(tuple(map(change, log)), delta=delta)


def weighted_by_place(log, delta):
    return sum(epsilon((e,), delta=delta) / (i + 1) for i, e in enumerate(log))


def about_fold(law, fold=None):
    law((EVENT,), (QUIET,), fold=fold)


def the_largest(log):
    return np.max([rdp(event, [2.0, 8.0]) for event in log] or np.zeros((1, 2)), 0)


def about_bounds(law, wrong=epsilon_bounds):
    law((EVENT,), 1e-5, epsilon_bounds=wrong)


def about_delta(law, wrong=delta_bounds):
    law((EVENT,), 1e-5, delta_bounds=wrong)


TOLD = replace(GAUSSIAN, telemetry=(ClipFraction(noise_multiplier=4.0),))

ACCOUNTING = [
    Mutant(
        "a count that is one",
        "counts_fold",
        about_cost((EVENT,), 3, 1e-5),
        of_events(lambda e: replace(e, count=1)),
    ),
    Mutant(
        "a count multiplied twice",
        "counts_fold",
        about_cost((EVENT,), 3, 1e-5),
        of_events(lambda e: replace(e, count=e.count**2)),
    ),
    Mutant("the largest cost for their sum", "costs_add_up", about_fold, the_largest),
    Mutant(
        "an order that matters",
        "logs_compose",
        about_cost((EVENT,), (QUIET,), 1e-5),
        weighted_by_place,
    ),
    Mutant(
        "only the last event counts",
        "logs_compose",
        about_cost((EVENT,), (QUIET,), 1e-5),
        lambda log, delta: epsilon(tuple(log)[-1:], delta=delta),
    ),
    Mutant(
        "a conversion below 0",
        "epsilon_is_a_number",
        about_cost((replace(EVENT, sampling_prob=1e-6),), 1e-2),
        lambda log, delta: epsilon(log, delta=delta) - 1e-3 * bool(log),
    ),
    Mutant(
        "NaN where nothing ran",
        "epsilon_is_a_number",
        about_cost((EVENT,), 1e-5),
        lambda log, delta: epsilon(log, delta=delta) if log else np.nan,
    ),
    Mutant(
        "a cost that rises with noise",
        "epsilon_is_monotone",
        about_cost(EVENT, 1e-5, 2.0),
        of_events(lambda e: replace(e, noise_multiplier=1 / e.noise_multiplier)),
    ),
    Mutant(
        "a cost that falls with steps",
        "epsilon_is_monotone",
        about_cost(EVENT, 1e-5, 2.0),
        of_events(lambda e: replace(e, count=1000 // e.count)),
    ),
    Mutant(
        "an approximation for a bound",
        "epsilon_covers",
        about_cost((EVENT,), 1e-5),
        partial(epsilon, accountant="gdp"),
    ),
    Mutant(
        "amplification counted twice",
        "epsilon_covers",
        about_cost((EVENT,), 1e-5),
        of_events(lambda e: replace(e, sampling_prob=e.sampling_prob**2)),
    ),
    Mutant(
        "a variance for a standard deviation",
        "epsilon_covers",
        about_cost((QUIET,), 1e-5),
        of_events(lambda e: replace(e, noise_multiplier=e.noise_multiplier**2)),
    ),
    Mutant(
        "an example replaced, accounted as removed",
        "relations_are_ordered",
        about_cost(EVENT, 1e-5),
        of_events(lambda e: replace(e, relation="add_or_remove_one")),
    ),
    Mutant(
        "an example replaced, accounted as removed from subsampled batches",
        "epsilon_covers",
        about_cost((replace(EVENT, relation="replace_one"),), 1e-5),
        of_events(lambda e: replace(e, relation="add_or_remove_one")),
    ),
    Mutant(
        "bounds in the wrong order",
        "bounds_bracket",
        about_bounds,
        lambda log, delta: epsilon_bounds(log, delta=delta)[::-1],
    ),
    Mutant(
        "bounds at twice the delta",
        "bounds_bracket",
        about_bounds,
        lambda log, delta: epsilon_bounds(log, delta=2 * delta),
    ),
    Mutant(
        "a delta of one step less",
        "bounds_bracket",
        about_delta,
        lambda log, epsilon: delta_bounds((replace(EVENT, count=9),), epsilon=epsilon),
    ),
    Mutant(
        "two queries on one draw counted apart",
        "queries_are_one_event",
        lambda law: law(TOLD),
        patches={"dpfunc.mechanism.combined_noise_multiplier": lambda *known: min(known)},
    ),
    Mutant(
        "multipliers added as variances are",
        "queries_are_one_event",
        lambda law: law(TOLD),
        patches={"dpfunc.mechanism.combined_noise_multiplier": lambda *known: np.hypot(*known)},
    ),
]


# --- the step

PARAMS = {"w": draws(3, 4), "b": draws(20_000, seed=5)}
BATCH = Batch(3 * draws(5, 4, seed=6), torch.tensor([1, 0, 1, 1, 1]) > 0, torch.tensor(1))
MOVING = replace(GAUSSIAN, clipping=Schedule([1.0, 0.25, 1.0]))


def loss(params, example):
    return (params["w"] @ example).square().sum() + params["b"][:4] @ example


RIGHT = private_grad(loss, GAUSSIAN)


def about_mean(law, gradient=None, mechanism=GAUSSIAN):
    gradient = private_grad(loss, mechanism) if gradient is None else gradient
    law(gradient, loss, PARAMS, BATCH, KEY, mechanism)


def about_release(law, gradient=None):
    gradient = private_grad(loss, GAUSSIAN) if gradient is None else gradient
    law(gradient, PARAMS, BATCH, KEY, GAUSSIAN)


def about_noise(law, gradient=None):
    law(private_grad(loss, GAUSSIAN) if gradient is None else gradient, PARAMS, BATCH, KEY)


def descend(params, grads):
    return trees.map(lambda p, g: p - 0.1 * g, params, grads)


def stepping(gradient=None, update=descend):
    def dp_step(params, batch, key):
        return update(params, (gradient or RIGHT)(params, batch, key))

    return dp_step


def about_step(law, step=None):
    params = trees.map(torch.clone, PARAMS)
    law(make_dp_step(loss, GAUSSIAN, descend) if step is None else step, params, BATCH, KEY)


def over_the_realised_size(params, batch, key):
    noisy = RIGHT(params, batch, key)
    return trees.map(lambda leaf: leaf * 20 / batch.mask.sum().clamp(min=1), noisy)


def mask_ignored(params, batch, key):
    return RIGHT(params, batch._replace(mask=torch.ones_like(batch.mask)), key)


def written_to(params, grads):
    return trees.map(lambda p, g: p.sub_(0.1 * g), params, grads)


CALLS = []


def counted_in_a_closure(params, batch, key):
    CALLS.append(key)
    return RIGHT(params, batch, random.fold_in(key, len(CALLS)))


def with_global_noise(params, batch, key):
    return of_the_global_generator(RIGHT(params, batch, key), key, GAUSSIAN)


def nothing_for_nobody(params, batch, key):
    grads = RIGHT(params, batch, key)
    return grads if batch.mask.any() else trees.map(torch.zeros_like, grads)


def nothing_for_no_rows(params, batch, key):
    grads = RIGHT(params, batch, key)
    return grads if len(batch.mask) else trees.map(torch.zeros_like, grads)


def refusing(params, batch, key):
    if len(batch.mask) == 0:
        raise ValueError("the batch is empty")
    return RIGHT(params, batch, key)


def other_when_compiled(params, batch, key):
    scale = 1.01 if torch.compiler.is_compiling() else 1.0
    return trees.map(lambda leaf: scale * leaf, params)


def branching(params, batch, key):
    return trees.map(lambda p: p if p.sum() > 0 else -p, params)


STEP = [
    Mutant(
        "the realised size for the public one",
        "release_is_the_mean",
        about_mean,
        over_the_realised_size,
    ),
    Mutant(
        "a divisor that is one too small",
        "release_is_the_mean",
        about_mean,
        private_grad(loss, replace(GAUSSIAN, expected_batch_size=19)),
    ),
    Mutant(
        "the sum for the mean",
        "release_is_the_mean",
        about_mean,
        private_grad(loss, replace(GAUSSIAN, loss_reduction="sum")),
    ),
    Mutant("a mask that nobody reads", "release_is_the_mean", about_mean, mask_ignored),
    Mutant(
        "a clip norm that does not move",
        "release_is_the_mean",
        partial(about_mean, mechanism=MOVING),
        private_grad(loss, replace(GAUSSIAN, clipping=1.0)),
    ),
    Mutant(
        "gradients that are not clipped",
        "released_neighbours_are_close",
        about_release,
        private_grad(loss, replace(GAUSSIAN, clipping=1e3, noise_multiplier=1.5e-3)),
    ),
    Mutant(
        "noise by the realised size",
        "event_tells_the_noise",
        about_release,
        over_the_realised_size,
    ),
    Mutant(
        "an event with another multiplier",
        "event_tells_the_noise",
        about_release,
        private_grad(loss, replace(GAUSSIAN, noise_multiplier=2.7)),
    ),
    Mutant(
        "one key for all steps",
        "noise_is_fresh",
        about_noise,
        patches={"dpfunc.random.derive": one_key_for_all_steps},
    ),
    Mutant(
        "one key for all leaves",
        "noise_is_fresh",
        about_noise,
        patches={"dpfunc.random.derive": one_key_for_all_leaves},
    ),
    Mutant("no noise for nobody", "event_tells_the_noise", about_release, nothing_for_nobody),
    Mutant("no noise for no rows", "empty_batch_is_noise", about_noise, nothing_for_no_rows),
    Mutant("an empty batch refused", "empty_batch_is_noise", about_noise, refusing),
    Mutant("parameters written to", "is_pure", about_step, stepping(update=written_to)),
    Mutant("a count in a closure", "is_pure", about_step, stepping(counted_in_a_closure)),
    Mutant("noise of the global generator", "is_pure", about_step, stepping(with_global_noise)),
    Mutant("a graph from step to step", "keeps_no_graph", about_step, stepping()),
    Mutant("another result when compiled", "compiles_alike", about_step, other_when_compiled),
    Mutant("a branch on values", "compiles_alike", about_step, branching),
]

MUTANTS = {
    f"{area}: {mutant.name}": mutant
    for area, mutants in {
        "clipping": CLIPPING,
        "noise": NOISE,
        "sampling": SAMPLING,
        "accounting": ACCOUNTING,
        "step": STEP,
    }.items()
    for mutant in mutants
}


@cache
def passes(law, ask):
    """The law holds as things are; asked once of each question."""
    ask(getattr(laws, law))
    return True


@pytest.mark.parametrize("name", MUTANTS)
def test_the_named_law_kills_the_mutant_and_spares_the_library(name, monkeypatch, fresh_compiler):
    _, law, ask, wrong, patches = MUTANTS[name]
    with torch.random.fork_rng(devices=[]):  # some mutants draw from the global generator
        assert passes(law, ask)
        for target, bug in patches.items():
            monkeypatch.setattr(target, bug)
        with pytest.raises(AssertionError):
            ask(getattr(laws, law), *([] if wrong is None else [wrong]))


def test_every_law_kills_a_mutant():
    helpers = {"contribution", "exact_norm", "drawn_by", "blank"}
    by_others = {"numbers_follow", "streams_are_independent"}  # which calibrated, independent ask
    assert {mutant.law for mutant in MUTANTS.values()} == set(laws.__all__) - helpers - by_others


@pytest.mark.parametrize("mutants", [CLIPPING, NOISE, SAMPLING, ACCOUNTING, STEP])
def test_no_mutant_is_there_twice(mutants):
    assert len({mutant.name for mutant in mutants}) == len(mutants) >= 5
