"""The audit of a step: run it, score the canaries, and set a lower bound beside the accounted epsilon."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dpfunc import _checks, random
from dpfunc.accounting import epsilon as accounted_epsilon
from dpfunc.audit.canaries import Canaries, gradient_canaries, marked_loss, quiet_coordinates
from dpfunc.audit.estimators import clopper_pearson, gaussian_fit, independent_runs
from dpfunc.audit.families import noise_family
from dpfunc.audit.onerun import one_run, one_run_curve
from dpfunc.audit.replicas import Draw, Observations, observe
from dpfunc.audit.scores import Score, likelihood_ratio
from dpfunc.events import Log
from dpfunc.mechanism import DPSGD, check_mechanism
from dpfunc.sampling import poisson_indices
from dpfunc.typing import Key, Loss, Params, Tree

ESTIMATORS = {
    "independent_runs": "the trade-off curve is that of the accounted mechanism at some noise; that "
    "the accounted epsilon is refuted, if it is, assumes nothing",
    "one_run": "nothing beyond the definition",
    "one_run_curve": "the trade-off curve is that of the accounted mechanism at some noise; that "
    "the accounted epsilon is refuted, if it is, assumes nothing",
    "clopper_pearson": "one canary in each run",
    "gaussian_fit": "independent normal scores of one variance, and a Gaussian trade-off curve",
}
"""Names of the estimators, and what each assumes."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)  # arrays have no one truth
class AuditReport:
    """What an audit found. PRIVATE where the data are: it ran on them many times.

    `print` it for the sentence, `dpfunc.audit.draw_audit(path, report)` for the picture.
    """

    lower: float
    """The lower bound on epsilon, at `delta`, with `confidence`."""
    epsilon: float
    """What the accountant says of the log of the events that the step returned."""
    delta: float
    confidence: float
    estimator: str
    num_steps: int
    log: Log
    scores: NDArray[np.float64]
    """(R, m): higher says in."""
    coins: NDArray[np.bool_]
    """(R, m): whether the canary was in."""
    guesses: NDArray[np.bool_]
    """(R, m): a score above the threshold that the shadow runs chose."""

    @property
    def refuted(self) -> bool:
        """Whether the audit contradicts the accounted epsilon."""
        return self.lower > self.epsilon

    @property
    def scores_in(self) -> NDArray[np.float64]:
        return self.scores[self.coins]

    @property
    def scores_out(self) -> NDArray[np.float64]:
        return self.scores[~self.coins]

    def __str__(self) -> str:
        verdict = "REFUTES" if self.refuted else "is consistent with"
        num_runs, num_canaries = self.scores.shape
        return (
            f"The audit {verdict} the accounted epsilon: epsilon >= {self.lower:.3f} with confidence "
            f"{self.confidence:g}, against {self.epsilon:.3f} accounted, at delta {self.delta:g} "
            f"({num_runs} runs of {self.num_steps} steps with {num_canaries} canaries; "
            f"{(self.guesses == self.coins).mean():.1%} of the guesses were right). "
            f"Estimator {self.estimator}, which assumes: {ESTIMATORS[self.estimator]}."
        )


def audit_step(
    make_step: Callable[[Loss], Callable[..., Any]],
    loss: Loss,
    params: Params,
    data: Tree,
    mechanism: DPSGD,
    key: Key,
    *,
    num_steps: int,
    delta: float,
    confidence: float = 0.95,
    canaries: Canaries | int = 64,
    num_replicas: int = 400,
    num_shadows: int = 100,
    replicas_at_once: int = 100,
    score: Score | None = None,
    estimator: str = "independent_runs",
    draw: Draw | None = None,
    progress: bool = False,
) -> AuditReport:
    """Run your own step many times with canaries in or out, and bound epsilon from below.

    Args:
        make_step: `make_step(loss) -> step` with `step(params, batch, key) -> (params, event)`: your
            step, for the loss that it is given, such as
            `lambda loss: dpfunc.make_dp_step(loss, mechanism, update)`. What an optimizer does with a
            released gradient is post-processing, so plain descent audits the release best.
        loss: `loss(params, example) -> scalar`, or as your step takes it.
        params: where every run begins.
        data: a pytree of tensors, every leaf (N, ...). A few hundred rows will do.
        mechanism: whose sampling_prob is drawn with, and whose sensitivity scales the canaries.
        key: of the whole audit. Each run, and the coins, get keys of their own.
        num_steps: steps of each run, >= 1.
        delta: in (0, 1).
        confidence: that the bound is below the true epsilon, in (0, 1).
        canaries: how many gradient canaries on quiet coordinates, with a gradient of 10 times the
            sensitivity; or what `gradient_canaries` or `example_canaries` made.
        num_replicas: runs that are scored.
        num_shadows: further runs, from which the score and its threshold learn, >= 2.
        replicas_at_once: runs mapped over by `torch.vmap`: memory, never meaning; 1 calls a step
            that vmap does not take as it is.
        score: None is `likelihood_ratio` at the mean sampling_prob; others in `dpfunc.audit`, or your own.
        estimator: a name in `dpfunc.audit.ESTIMATORS`, which says what it assumes. "clopper_pearson"
            takes one canary alone.
        draw: `draw(num_examples, key, step) -> indices`, your sampler. None draws as
            `poisson_batches` does, with the key that the step gets.
        progress: show a bar (needs tqdm).

    Returns:
        AuditReport: `lower`, `epsilon`, `refuted`, the sentence by `str`, and the scores.

    Guarantees:
        If the step keeps what its events claim, and runs under different keys are independent, `lower`
        is above `epsilon` with probability at most 1 - confidence, whatever the data, canaries and
        score are. (For "gaussian_fit" under its assumption alone.)
        A function of its arguments: the same key gives the same report.
        The coins are independent of all that sampler and step draw.

    Raises:
        ValueError: a number out of range, a relation other than "add_or_remove_one", a truncated
            sampler without draw, scores with a NaN or of another shape.
        TypeError: make_step or its step is not callable, or the step returns no (params, event).

    Source: Steinke et al. 2023, arXiv:2305.08846 (coins); Nasr et al. 2023, arXiv:2302.07956 (gradient
        canaries); Carlini et al. 2022, arXiv:2112.03570 (shadow runs).

    >>> import torch, dpfunc
    >>> mechanism = DPSGD(clipping=1.0, noise_multiplier=2.0, sampling_prob=1.0, expected_batch_size=9)
    >>> report = audit_step(
    ...     lambda loss: dpfunc.make_dp_step(loss, mechanism, lambda w, g: w - g),
    ...     lambda w, x: w @ x, torch.zeros(9), torch.zeros(9, 9), mechanism, random.key(0),
    ...     num_steps=1, delta=1e-5, canaries=8, num_replicas=200, num_shadows=50)
    >>> print(f"{report.lower:.2f} <= {report.epsilon:.2f}")
    0.89 <= 1.99
    """
    if not callable(make_step):
        raise TypeError(
            f"Expected make_step to be a function of a loss, got {type(make_step).__name__}. "
            "For example lambda loss: dpfunc.make_dp_step(loss, mechanism, update)."
        )
    check_mechanism(mechanism)
    num_steps = _checks.integer(at_least=1, num_steps=num_steps)
    num_replicas = _checks.integer(at_least=2, num_replicas=num_replicas)
    num_shadows = _checks.integer(at_least=2, num_shadows=num_shadows)
    at_once = _checks.integer(at_least=1, replicas_at_once=replicas_at_once)
    delta = _checks.open_unit(delta=delta)
    confidence = _checks.open_unit(confidence=confidence)
    _checks.choice(tuple(ESTIMATORS), estimator=estimator)
    if mechanism.relation != "add_or_remove_one":
        raise ValueError(
            "Expected the relation 'add_or_remove_one', for canaries are in or out, got "
            f"{mechanism.relation!r}."
        )
    canary_key, run_key = random.split(key, 2)
    if not isinstance(canaries, Canaries):
        num = _checks.integer(at_least=1, canaries=canaries)
        quiet = quiet_coordinates(loss, params, data, canary_key, num=num)
        canaries = gradient_canaries(data, quiet, scale=10.0 * mechanism.sensitivity)
    if estimator == "clopper_pearson" and len(canaries.watched) > 1:
        raise ValueError(
            f"Expected canaries=1 for 'clopper_pearson', got {len(canaries.watched)}: the canaries of "
            "one run need not be independent."
        )
    step = make_step(marked_loss(loss))
    if not callable(step):
        raise TypeError(
            f"Expected make_step(loss) to return a step, got {type(step).__name__}. "
            "For example lambda loss: dpfunc.make_dp_step(loss, mechanism, update)."
        )
    everything, log = observe(
        step,
        loss,
        params,
        data,
        canaries,
        run_key,
        draw=_sampler(mechanism) if draw is None else draw,
        num_steps=num_steps,
        num_replicas=num_shadows + num_replicas,
        replicas_at_once=at_once,
        progress=progress,
    )
    shadows, observed = everything.runs(0, num_shadows), everything.runs(num_shadows, None)
    probs = [mechanism.sampling_prob_at(step) for step in range(num_steps)]
    score = likelihood_ratio(sum(probs) / num_steps) if score is None else score
    found = _scored(score, shadows, observed)
    above, threshold = _threshold(_scored(score, shadows, shadows), shadows.coins)
    found = found if above else -found
    guesses = found > threshold
    return AuditReport(
        lower=_lower(estimator, found, guesses, observed.coins, log, delta, confidence),
        epsilon=accounted_epsilon(log, delta=delta),
        delta=delta,
        confidence=confidence,
        estimator=estimator,
        num_steps=num_steps,
        log=log,
        scores=found,
        coins=observed.coins,
        guesses=guesses,
    )


def _lower(
    estimator: str,
    scores: NDArray[np.float64],
    guesses: NDArray[np.bool_],
    coins: NDArray[np.bool_],
    log: Log,
    delta: float,
    confidence: float,
) -> float:
    if estimator == "independent_runs":
        accuracies = (guesses == coins).mean(1)
        return independent_runs(accuracies, noise_family(log), delta=delta, confidence=confidence)
    bound = {
        "one_run": one_run,
        "one_run_curve": partial(one_run_curve, family=noise_family(log)),
        "clopper_pearson": clopper_pearson,
        "gaussian_fit": gaussian_fit,
    }[estimator]
    return bound(scores[coins], scores[~coins], delta=delta, confidence=confidence)


def _sampler(mechanism: DPSGD) -> Draw:
    if mechanism.sampling == "truncated_poisson":
        raise ValueError(
            "Expected draw= for sampling='truncated_poisson': your own draw(num_examples, key, step)."
        )

    def draw(num_examples: int, key: Key, step: int) -> Tensor:
        prob = mechanism.sampling_prob_at(step)
        return poisson_indices(num_examples, key, step, sampling_prob=prob)

    return draw


def _scored(score: Score, shadows: Observations, observed: Observations) -> NDArray[np.float64]:
    found = np.asarray(score(shadows, observed), dtype=np.float64)
    if found.shape != observed.coins.shape:
        raise ValueError(
            f"Expected score to return shape {observed.coins.shape} (runs, canaries), got {found.shape}."
        )
    if np.isnan(found).any():
        raise ValueError(
            f"Expected scores without NaN, got {int(np.isnan(found).sum())}. Do the losses diverge?"
        )
    return found


def _threshold(scores: NDArray[np.float64], coins: NDArray[np.bool_]) -> tuple[bool, float]:
    """Which side of which score is more often in, over the shadow runs."""
    order = np.argsort(scores, axis=None, kind="stable")
    ranked, was_in = scores.ravel()[order], coins.ravel()[order]
    # Right guesses if everything above place i is said to be in, for the i where the score rises.
    right = np.cumsum(~was_in) + (was_in.sum() - np.cumsum(was_in))
    right = np.where(np.append(np.diff(ranked) > 0, True), right, len(right) / 2)
    high, low = int(right.argmax()), int(right.argmin())
    if right[high] >= len(right) - right[low]:
        return True, float(ranked[high])
    return False, float(np.nextafter(-ranked[low], -np.inf))
