"""What an audit finds: of a step that keeps its claim, and of six that do not.

    ./dev bench audit              40 seeded audits at each of epsilon 1, 3 and 8: coverage, tightness
    ./dev bench audit --broken     six broken variants, and which of them the audit refutes

The model is logistic regression on 300 of scikit-learn's digits (650 parameters): small enough for 500
runs an audit, each from its own key. White box: gradient canaries, every noisy step observed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from harness import machine, write
from scipy.stats import binomtest
from torch import Tensor
from torch.nn.functional import cross_entropy

import dpfunc
from dpfunc import DPSGD, Batch, audit, random, trees
from dpfunc.noise import privatize

DELTA, CONFIDENCE, NUM_EXAMPLES = 1e-5, 0.95, 300
SAMPLING_PROB, NUM_STEPS = 0.25, 4
EPSILONS, NUM_AUDITS = (1.0, 3.0, 8.0), 40
COMPARED = 10  # audits on whose scores the other estimators are tried too
STATED = {1.0: 0.6, 3.0: 0.75, 8.0: 0.85}
"""The fraction of the accounted epsilon that the median audit is to reach."""


def digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images[:NUM_EXAMPLES] / 16.0).float(), torch.tensor(labels[:NUM_EXAMPLES])


def loss(params: Any, example: Any) -> Tensor:
    image, label = example
    return cross_entropy(params["weight"] @ image + params["bias"], label)


PARAMS = {"weight": torch.zeros(10, 64), "bias": torch.zeros(10)}


def update(params: Any, grads: Any) -> Any:
    return trees.map(lambda p, g: p - 0.5 * g, params, grads)


def mechanism_for(epsilon: float, sampling_prob: float, num_steps: int) -> DPSGD:
    noise = dpfunc.calibrate_noise_multiplier(
        target_epsilon=epsilon, delta=DELTA, sampling_prob=sampling_prob, num_steps=num_steps
    )
    return DPSGD(
        clipping=1.0,
        noise_multiplier=noise,
        sampling_prob=sampling_prob,
        expected_batch_size=sampling_prob * NUM_EXAMPLES,
    )


def audited(
    make_step: Any,
    mechanism: DPSGD,
    seed: int,
    num_steps: int,
    *,
    num_rows: int = NUM_EXAMPLES,
    **options: Any,
) -> Any:
    return audit.audit_step(
        make_step,
        loss,
        PARAMS,
        trees.rows(digits(), 0, num_rows),
        mechanism,
        random.key(seed),
        num_steps=num_steps,
        delta=DELTA,
        confidence=CONFIDENCE,
        **options,
    )


def others(report: Any) -> dict[str, float]:
    """What the other estimators say of the same scores."""
    inside, outside = report.scores_in, report.scores_out
    family = audit.noise_family(report.log)
    return {
        "one_run": audit.one_run(inside, outside, delta=DELTA, confidence=CONFIDENCE),
        "one_run_curve": audit.one_run_curve(
            inside, outside, delta=DELTA, confidence=CONFIDENCE, family=family
        ),
        "gaussian_fit": audit.gaussian_fit(inside, outside, delta=DELTA, confidence=CONFIDENCE),
    }


def summary(lower: list[float], accounted: float) -> dict[str, Any]:
    """How often the bound exceeded the accounted epsilon, and how near it came."""
    exceeded = sum(bound > accounted for bound in lower)
    test = binomtest(exceeded, len(lower), 1 - CONFIDENCE, alternative="greater")
    return {
        "exceeded": exceeded,
        "binomial_p_value": float(test.pvalue),
        "median_fraction": float(np.median(lower) / accounted),
        "smallest_fraction": min(lower) / accounted,
        "lower": [round(bound, 4) for bound in lower],
    }


def sound(num_audits: int) -> dict[str, Any]:
    rows = []
    for epsilon in EPSILONS:
        mechanism = mechanism_for(epsilon, SAMPLING_PROB, NUM_STEPS)

        def make_step(loss: Any, mechanism: DPSGD = mechanism) -> Any:
            return dpfunc.make_dp_step(loss, mechanism, update)

        begin = time.perf_counter()
        lower: dict[str, list[float]] = {}
        accounted = 0.0
        for seed in range(num_audits):
            report = audited(make_step, mechanism, seed, NUM_STEPS)
            accounted = report.epsilon
            compared = others(report) if seed < COMPARED else {}
            for name, bound in {"independent_runs": report.lower, **compared}.items():
                lower.setdefault(name, []).append(bound)
        row = {
            "accounted": accounted,
            "noise_multiplier": mechanism.noise_multiplier,
            "sampling_prob": SAMPLING_PROB,
            "num_steps": NUM_STEPS,
            "audits": num_audits,
            "stated_fraction": STATED[epsilon],
            "seconds_an_audit": (time.perf_counter() - begin) / num_audits,
            "estimators": {n: summary(bounds, accounted) for n, bounds in lower.items()},
        }
        print(row, flush=True)
        rows.append(row)
    return {"rows": rows}


# Six ways to be wrong. Each returns the event of the mechanism that it claims to be.


def release(params: Any, total: Any, batch: Batch, key: Any, mechanism: DPSGD) -> Any:
    noise_key = random.derive(key, random.NOISE, batch.step)
    return update(params, privatize(total, noise_key, mechanism)), mechanism.event()


def noise_halved(mechanism: DPSGD) -> Any:
    quiet = replace(mechanism, noise_multiplier=mechanism.event().noise_multiplier / 2)

    def make_step(loss: Any) -> Any:
        step = dpfunc.make_dp_step(loss, quiet, update)
        return lambda params, batch, key: (step(params, batch, key)[0], mechanism.event())

    return make_step


def clipping_off(mechanism: DPSGD) -> Any:
    def make_step(loss: Any) -> Any:
        total = dpfunc.clipped_grad(loss, 1e6)
        return lambda params, batch, key: release(
            params, total(params, batch.data, mask=batch.mask).sum, batch, key, mechanism
        )

    return make_step


def noise_reused(mechanism: DPSGD) -> Any:
    def make_step(loss: Any) -> Any:
        step = dpfunc.make_dp_step(loss, mechanism, update)
        return lambda params, batch, key: step(params, batch._replace(step=torch.tensor(0)), key)

    return make_step


def leaf_key_reused(mechanism: DPSGD) -> Any:
    def make_step(loss: Any) -> Any:
        total = dpfunc.clipped_grad(loss, mechanism.clipping)

        def step(params: Any, batch: Batch, key: Any) -> Any:
            noise_key = random.derive(key, random.NOISE, batch.step)
            scale = mechanism.event().noise_multiplier * mechanism.sensitivity
            noisy = trees.map(
                lambda leaf: (
                    (leaf + scale * random.normal(noise_key, leaf.shape))
                    / mechanism.expected_batch_size
                ),
                total(params, batch.data, mask=batch.mask).sum,
            )
            return update(params, noisy), mechanism.event()

        return step

    return make_step


def layers_forgotten(mechanism: DPSGD) -> Any:
    def make_step(loss: Any) -> Any:
        grads = dpfunc.per_sample_grads(loss)

        def step(params: Any, batch: Batch, key: Any) -> Any:
            total = trees.map(
                lambda leaf: dpfunc.clip_and_sum(leaf, mechanism.clipping, mask=batch.mask).sum,
                grads(params, batch.data),
            )
            return release(params, total, batch, key, mechanism)

        return step

    return make_step


def ordinary(mechanism: DPSGD) -> Any:
    return lambda loss: dpfunc.make_dp_step(loss, mechanism, update)


def shuffled(num_batches: int) -> Callable[..., Tensor]:
    def draw(num_examples: int, key: Any, step: int) -> Tensor:
        epoch, place = divmod(step, num_batches)
        order = random.uniform(random.fold_in(key, epoch), (num_examples,), dtype=torch.float64)
        return order.argsort().tensor_split(num_batches)[place].sort().values

    return draw


def twins() -> audit.Canaries:
    """Canaries in the weight, watched less the bias at the same offset: the noise, if it is one, cancels."""
    offsets = torch.arange(10)  # leaves in tree order: bias, then weight
    canaries = audit.gradient_canaries(digits(), 10 + offsets, scale=10.0)
    weights = torch.tensor([1.0, -1.0], dtype=torch.float64).expand(10, 2)
    return canaries._replace(watched=torch.stack([10 + offsets, offsets], 1), weights=weights)


def across_leaves() -> audit.Canaries:
    """Canaries with as much gradient in the bias as in the weight."""
    return audit.gradient_canaries(digits(), audit.every_leaf(PARAMS, num=10), scale=10.0)


class Case(NamedTuple):
    """A broken variant, and the statistic that is aimed at it where the general one is blind."""

    make: Callable[[DPSGD], Any]
    epsilon: float = 3.0
    sampling_prob: float = SAMPLING_PROB
    num_steps: int = 8
    general: Mapping[str, Any] = MappingProxyType({})
    targeted: Mapping[str, Any] = MappingProxyType({})
    about: str = ""


CASES = {
    "noise halved": Case(noise_halved),
    "clipping off": Case(clipping_off),
    "noise reused each step": Case(
        noise_reused,
        targeted={"score": audit.spread_score},
        about="spread of a canary's projection over the steps, where repeated noise cancels",
    ),
    "key reused across leaves": Case(
        leaf_key_reused,
        targeted={"canaries": twins()},
        about="canaries in one leaf, watched less the same offset of another leaf",
    ),
    "per-layer sensitivity forgotten": Case(
        layers_forgotten,
        targeted={"canaries": across_leaves(), "num_rows": 20, "num_replicas": 1500},
        about="canaries with a coordinate in every leaf, beside 20 examples",
    ),
    "shuffled fixed batches accounted as Poisson": Case(
        ordinary,
        epsilon=8.0,
        num_steps=4,
        general={"draw": shuffled(4)},
        targeted={"score": audit.largest_score},
        about="largest projection of any step",
    ),
}


def broken() -> dict[str, Any]:
    rows = []
    for seed, (name, case) in enumerate(CASES.items()):
        mechanism = mechanism_for(case.epsilon, case.sampling_prob, case.num_steps)
        make_step = case.make(mechanism)
        for statistic in ("general", "targeted"):
            options: dict[str, Any] = {
                **case.general,
                **(case.targeted if statistic == "targeted" else {}),
            }
            begin = time.process_time()
            report = audited(make_step, mechanism, seed, case.num_steps, **options)
            spent = time.process_time() - begin
            options["draw"] = None
            control = audited(ordinary(mechanism), mechanism, seed, case.num_steps, **options)
            rows.append(
                {
                    "variant": name,
                    "statistic": statistic,
                    "about": case.about if statistic == "targeted" else "likelihood ratio",
                    "accounted": report.epsilon,
                    "lower": report.lower,
                    "refuted": report.refuted,
                    "cpu_seconds": spent,
                    "lower_of_a_sound_step": control.lower,
                    "refutes_a_sound_step": control.refuted,
                }
            )
            print(rows[-1], flush=True)
            if report.refuted or not case.targeted:
                break
    refuted = {row["variant"] for row in rows if row["refuted"]}
    return {
        "refuted": len(refuted),
        "of": len(CASES),
        "cpu_seconds": sum(row["cpu_seconds"] for row in rows),
        "rows": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--broken", action="store_true")
    parser.add_argument("--audits", type=int, default=NUM_AUDITS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    result = broken() if options.broken else sound(options.audits)
    name = "audit-broken-cpu" if options.broken else "audit-sound-cpu"
    head = {"machine": machine("cpu"), "threads": 1, "delta": DELTA, "confidence": CONFIDENCE}
    head |= {"model": f"logistic regression on {NUM_EXAMPLES} of scikit-learn's digits"}
    print(f"wrote {write(name, head | result)}")


if __name__ == "__main__":
    main()
