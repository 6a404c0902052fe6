"""Epsilon and CPU time of every accountant on 49 logs: dpfunc, Opacus, dp-accounting, prv_accountant.

    ./dev bench accounting [--only REGEX] [--configs REGEX] [--quick] [--large]

Before anything is timed, dpfunc's interval must contain every reference of
tests/golden/epsilon_vectors.json and agree with what is known of the 49 logs to six digits. A log's
truth is its reference where it has one, and dpfunc's certified interval where not: that dpfunc does
not under-report is shown by the references alone.

Each call is one forked process with a limit on memory and CPU time, and a log that this process has
not seen: calls on logs with slightly more noise, up to 20 of them or for 50 ms, warm the process up, and
no cache holds the answer.
Seconds are CPU time (`time.process_time`) of the call alone, on one thread; median of 5 rounds in
which contestants take turns, or one call where that takes over 2 s. A log is put into the
contestant's own types beforehand.

Then all bounds that a contestant can give of one log, at several accuracies; the noise for three
targets; and with --large, instead, logs of up to 1e6 distinct steps.

dp-accounting pins an old attrs, so it and prv_accountant are no development dependencies. Where they
cannot be imported, their rows are missing; INSTALL says how to have them.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import importlib.util
import json
import math
import multiprocessing
import os
import re
import resource
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from harness import RESULTS, machine, write

from dpfunc import StepEvent
from dpfunc.accounting import calibrate_noise_multiplier, epsilon
from dpfunc.accounting.gdp import gdp_epsilon
from dpfunc.accounting.pld import epsilon_bounds
from dpfunc.events import Log

INSTALL = (
    ".venv/bin/python -m pip install --no-deps dp-accounting==0.6.0 prv-accountant==0.2.0 "
    "absl-py attrs dm-tree wrapt"
)
VECTORS = Path(__file__).parents[1] / "tests" / "golden" / "epsilon_vectors.json"

LIMIT = 60.0  # seconds of CPU, a call
HANGS = 5.0  # times as much of the wall clock
MEMORY = 8 * 2**30  # bytes beyond what a fresh process has
SLOW, REPEATS = 2.0, 5
WARM, WARM_SECONDS = 20, 0.05
UNDER = 1e-9  # relative; what is below the truth by more under-reports
DIGITS = 6e-6  # relative: what six digits may be off by
QUICK = 5.0


class Run(NamedTuple):
    noise: float
    prob: float
    steps: int
    mechanism: str = "gaussian"


class Config(NamedTuple):
    name: str
    delta: float
    runs: tuple[Run, ...]
    known: float
    """Epsilon to six digits, by an earlier prototype in other arithmetic."""


Answer: TypeAlias = "tuple[float | None, float]"  # a lower bound, where there is one; the epsilon
Task: TypeAlias = "Callable[[float], Answer]"  # at delta


class Engine(NamedTuple):
    name: str
    prepare: Callable[[tuple[Run, ...]], Task]
    offers: Callable[[tuple[Run, ...]], bool]
    package: str


# --- the 49 logs

# name: (noise, probability, steps, delta, known epsilon)
HOMOGENEOUS = {
    "mnist_tfp_s1.1_60ep": (1.1, 256 / 60000, 14062, 1e-5, 2.3816),
    "mnist_tfp_s1.3_15ep": (1.3, 256 / 60000, 3515, 1e-5, 0.86441),
    "mnist_tfp_s0.7_45ep": (0.7, 256 / 60000, 10546, 1e-5, 5.63941),
    "abadi_q.01_s4_1e4": (4.0, 0.01, 10**4, 1e-5, 0.946867),
    "q.01_s1_1e3": (1.0, 0.01, 10**3, 1e-5, 1.82824),
    "q.01_s1_1e4": (1.0, 0.01, 10**4, 1e-5, 6.18771),
    "q.01_s1_1e5": (1.0, 0.01, 10**5, 1e-5, 25.5731),
    "q.01_s.5_1e3": (0.5, 0.01, 10**3, 1e-5, 13.3608),
    "q.01_s.3_100": (0.3, 0.01, 100, 1e-5, 26.8347),
    "q.01_s.3_1e4": (0.3, 0.01, 10**4, 1e-5, 296.827),
    "q.01_s8_1e4": (8.0, 0.01, 10**4, 1e-5, 0.437249),
    "q.01_s2_1": (2.0, 0.01, 1, 1e-5, 0.0282591),
    "q.1_s1_100": (1.0, 0.1, 100, 1e-5, 7.0466),
    "q.1_s2_1e3": (2.0, 0.1, 10**3, 1e-5, 8.27929),
    "q.1_s8_1e3": (8.0, 0.1, 10**3, 1e-5, 1.55136),
    "q.1_s8_1e5": (8.0, 0.1, 10**5, 1e-5, 24.1214),
    "q.1_s.5_100": (0.5, 0.1, 100, 1e-5, 31.371),
    "q.1_s.3_1": (0.3, 0.1, 1, 1e-5, 14.9816),
    "q.001_s.6_1e4": (0.6, 0.001, 10**4, 1e-6, 3.15219),
    "q.001_s1_1e5": (1.0, 0.001, 10**5, 1e-6, 1.86105),
    "q.001_s.3_1e3": (0.3, 0.001, 10**3, 1e-6, 21.678),
    "q.001_s8_1e5": (8.0, 0.001, 10**5, 1e-6, 0.147914),
    "q.001_s1_100_d1e-8": (1.0, 0.001, 100, 1e-8, 0.193544),
    "q.001_s4_1e3_small": (4.0, 0.001, 10**3, 1e-5, 0.0215718),
    "q1e-4_s.5_1e5": (0.5, 1e-4, 10**5, 1e-6, 2.87755),
    "q1e-4_s1_1e5": (1.0, 1e-4, 10**5, 1e-6, 0.156892),
    "q1e-4_s1_1e4_d1e-8": (1.0, 1e-4, 10**4, 1e-8, 0.0623033),
    "q1e-4_s.3_1e4": (0.3, 1e-4, 10**4, 1e-6, 14.5386),
    "q1e-4_s4_1e5_d1e-8": (4.0, 1e-4, 10**5, 1e-8, 0.0352648),
    "full_s1_1": (1.0, 1.0, 1, 1e-5, 4.37718),
    "full_s8_100": (8.0, 1.0, 100, 1e-5, 5.67959),
    "full_s.3_1": (0.3, 1.0, 1, 1e-5, 19.1308),
    "full_s8_1e4_huge": (8.0, 1.0, 10**4, 1e-5, 130.577),
    "full_s4_1e3": (4.0, 1.0, 10**3, 1e-5, 64.1688),
    "full_s100_1e3": (100.0, 1.0, 10**3, 1e-5, 1.19937),
    "q.01_s1_1e3_d1e-8": (1.0, 0.01, 10**3, 1e-8, 2.69787),
    "q.01_s1_1e3_d1e-12": (1.0, 0.01, 10**3, 1e-12, 3.9143),
    "q.5_s2_500": (2.0, 0.5, 500, 1e-5, 40.7989),
    "q.001_s1_1e6": (1.0, 0.001, 10**6, 1e-6, 6.69427),
    "q1e-4_s.8_1e6": (0.8, 1e-4, 10**6, 1e-7, 0.912703),
}

# The rest are mixed: of several settings, or of Laplace noise.
LAPLACE = {
    "lap_b10_100": ((Run(10.0, 1.0, 100, "laplace"),), 1e-5, 4.22035),
    "lap_b1_q.01_1e3": ((Run(1.0, 0.01, 1000, "laplace"),), 1e-5, 1.12377),
    "lap_gauss_mix": (
        (Run(20.0, 1.0, 50, "laplace"), Run(1.0, 0.01, 1000)),
        1e-5,
        2.30596,
    ),
}


def vectors() -> list[dict[str, Any]]:
    return json.loads(VECTORS.read_text())["vectors"]


def runs_of(vector: dict[str, Any]) -> tuple[Run, ...]:
    return tuple(
        Run(row["noise_multiplier"], row["rate"], row["steps"], row["mechanism"])
        for row in vector["log"]
    )


def configs() -> list[Config]:
    by_id = {vector["id"]: runs_of(vector) for vector in vectors()}
    random = by_id["v60"]  # drawn once: noise, probability and steps of 100 stretches
    mixed = {
        # Noise 2 to 0.8 in ten stretches of 100 steps.
        "het_10seg_noise_decay": (by_id["v58"], 1e-5, 1.76318),
        # Batches that grow 20-fold.
        "het_20seg_growing_batch": (
            tuple(Run(1.0, 0.001 * k, 500) for k in range(1, 21)),
            1e-5,
            7.70185,
        ),
        "het_100seg_random": (random, 1e-6, 4.16),
        # Every step has its own noise, from 2 down to 0.7.
        "het_1000_distinct_sigma": (
            tuple(Run(float(noise), 0.01, 1) for noise in np.linspace(2.0, 0.7, 1000)),
            1e-5,
            2.13182,
        ),
        # Adaptive clipping, its count a release of its own at every step.
        "het_adaclip": ((Run(1.0, 0.01, 10**4), Run(10.0, 0.01, 10**4)), 1e-5, 6.20736),
        # One full-batch release, then training.
        "het_fullbatch_init": (by_id["v62"], 1e-6, 2.36207),
    }
    return [
        *(
            Config(name, delta, (Run(noise, prob, steps),), known)
            for name, (noise, prob, steps, delta, known) in HOMOGENEOUS.items()
        ),
        *(
            Config(name, delta, runs, known)
            for name, (runs, delta, known) in (mixed | LAPLACE).items()
        ),
    ]


# --- the contestants


def log_of(runs: Iterable[Run]) -> Log:
    return Log(
        StepEvent(
            noise_multiplier=run.noise,
            sampling_prob=run.prob,
            count=run.steps,
            mechanism=run.mechanism,
            sampling="poisson" if run.prob < 1 else "none",
        )
        for run in runs
    )


def dpfunc_pld(runs: tuple[Run, ...]) -> Task:
    log = log_of(runs)
    return lambda delta: epsilon_bounds(log, delta=delta)


def dpfunc_rdp(runs: tuple[Run, ...]) -> Task:
    log = log_of(runs)
    return lambda delta: (None, epsilon(log, delta=delta, accountant="rdp"))


def dpfunc_gdp(runs: tuple[Run, ...]) -> Task:
    log = log_of(runs)
    return lambda delta: (None, gdp_epsilon(log, delta))


def opacus_accountant(name: str, runs: tuple[Run, ...]) -> Any:
    accountant: Any = importlib.import_module("opacus.accountants").create_accountant(name)
    accountant.history = [(run.noise, run.prob, run.steps) for run in runs]
    return accountant


def opacus(name: str, runs: tuple[Run, ...]) -> Task:
    accountant = opacus_accountant(name, runs)
    return lambda delta: (None, accountant.get_epsilon(delta=delta))


def opacus_prv(error: float, runs: tuple[Run, ...]) -> Task:
    """What its `get_epsilon` does, which throws the lower bound away."""
    accountant = opacus_accountant("prv", runs)

    def task(delta: float) -> Answer:
        law = accountant._get_dprv(eps_error=error, delta_error=delta / 1000)
        lower, _, upper = law.compute_epsilon(delta, delta / 1000, error)
        return lower, upper

    return task


def google_event(run: Run) -> Any:
    library = importlib.import_module("dp_accounting")
    kinds = {"gaussian": library.GaussianDpEvent, "laplace": library.LaplaceDpEvent}
    event = kinds[run.mechanism](run.noise)
    return event if run.prob == 1 else library.PoissonSampledDpEvent(run.prob, event)


def google(name: str, runs: tuple[Run, ...]) -> Task:
    events = [(google_event(run), run.steps) for run in runs]

    def task(delta: float) -> Answer:
        accountant = google_accountant(name)
        for event, steps in events:
            accountant.compose(event, steps)
        return None, accountant.get_epsilon(delta)

    return task


def google_accountant(name: str) -> Any:
    if name == "rdp":
        return importlib.import_module("dp_accounting.rdp").RdpAccountant()
    return importlib.import_module("dp_accounting.pld").PLDAccountant()


def google_bounds(interval: float, runs: tuple[Run, ...]) -> Task:
    """Its pessimistic and its optimistic discretisation of Gaussian noise."""
    library = importlib.import_module("dp_accounting.pld.privacy_loss_distribution")

    def one(delta: float, pessimistic: bool) -> float:
        laws = [
            library.from_gaussian_mechanism(
                run.noise,
                sampling_prob=run.prob,
                value_discretization_interval=interval,
                pessimistic_estimate=pessimistic,
            ).self_compose(run.steps)
            for run in runs
        ]
        total = laws[0]
        for law in laws[1:]:
            total = total.compose(law)
        return total.get_epsilon_for_delta(delta)

    return lambda delta: (one(delta, False), one(delta, True))


def microsoft(error: float, runs: tuple[Run, ...]) -> Task:
    library = importlib.import_module("prv_accountant")
    kinds = importlib.import_module("prv_accountant.privacy_random_variables")
    laws = [
        kinds.LaplaceMechanism(1 / run.noise)
        if run.mechanism == "laplace"
        else kinds.GaussianMechanism(run.noise)
        if run.prob == 1
        else kinds.PoissonSubsampledGaussianMechanism(run.prob, run.noise)
        for run in runs
    ]
    steps = [run.steps for run in runs]

    def task(delta: float) -> Answer:
        accountant = library.PRVAccountant(
            laws, max_self_compositions=steps, eps_error=error, delta_error=delta / 1000
        )
        lower, _, upper = accountant.compute_epsilon(delta, steps)
        return lower, upper

    return task


def everything(runs: tuple[Run, ...]) -> bool:
    return True


def gaussian(runs: tuple[Run, ...]) -> bool:
    return all(run.mechanism == "gaussian" for run in runs)


def one_gaussian(runs: tuple[Run, ...]) -> bool:
    return len(runs) == 1 and gaussian(runs)


def no_sampled_laplace(runs: tuple[Run, ...]) -> bool:
    return all(run.mechanism == "gaussian" or run.prob == 1 for run in runs)


ENGINES = (
    Engine("dpfunc pld", dpfunc_pld, everything, "dpfunc"),
    Engine("dpfunc rdp", dpfunc_rdp, gaussian, "dpfunc"),
    Engine("dpfunc gdp", dpfunc_gdp, gaussian, "dpfunc"),
    Engine("opacus rdp", partial(opacus, "rdp"), gaussian, "opacus"),
    Engine("opacus gdp", partial(opacus, "gdp"), one_gaussian, "opacus"),
    Engine("opacus prv", partial(opacus_prv, 0.01), gaussian, "opacus"),
    Engine("dp-accounting rdp", partial(google, "rdp"), no_sampled_laplace, "dp_accounting"),
    Engine("dp-accounting pld", partial(google, "pld"), everything, "dp_accounting"),
    Engine("prv_accountant", partial(microsoft, 0.01), no_sampled_laplace, "prv_accountant"),
)
"""With the settings they come with: PRV eps_error 0.01, PLD intervals of 1e-4."""

LADDER = (
    ENGINES[0],
    *(
        Engine(f"{name}, {setting:g}", partial(prepare, setting), gaussian, package)
        for name, prepare, package, settings in (
            ("opacus prv", opacus_prv, "opacus", (0.1, 0.01, 0.001)),
            ("dp-accounting pld", google_bounds, "dp_accounting", (1e-3, 1e-4, 1e-5)),
            ("prv_accountant", microsoft, "prv_accountant", (0.1, 0.01, 0.001)),
        )
        for setting in settings
    ),
)
LADDER_CONFIG = "q.01_s1_1e4"


def importable(engines: Sequence[Engine]) -> list[Engine]:
    missing = {e.package for e in engines if importlib.util.find_spec(e.package) is None}
    if missing:
        print(f"cannot import {', '.join(sorted(missing))}: rows missing. To have them:\n{INSTALL}")
    return [engine for engine in engines if engine.package not in missing]


# --- one call, contained


class Failed(Exception):
    """Why a contestant gave no epsilon."""


Begin: TypeAlias = "Callable[[], None]"
"""Called in the child, it starts the count of its seconds anew."""


def contained(task: Callable[[Begin], Any], seconds: float) -> Any:
    """The value of task in a forked process that may use so many seconds of CPU, or Failed."""
    fork = multiprocessing.get_context("fork")
    here, there = fork.Pipe(duplex=False)

    def child() -> None:
        out = os.open(os.devnull, os.O_WRONLY)
        os.dup2(out, 1)
        os.dup2(out, 2)
        warnings.simplefilter("ignore")
        size = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
        try:
            there.send((True, task(lambda: there.send(None))))
        except MemoryError:
            there.send((False, f"more than {MEMORY >> 30} GiB of memory"))
        except Failed as failed:
            there.send((False, str(failed)))
        except Exception as error:
            there.send((False, f"{type(error).__name__}: {error}"[:200]))

    process = fork.Process(target=child)
    process.start()
    there.close()
    try:
        done, value = watched(here, process.pid or 0, seconds)
    except EOFError:
        process.join()
        done, value = False, f"exit {process.exitcode}"
    process.kill()
    process.join()
    here.close()
    if not done:
        raise Failed(value)
    return value


def watched(here: Connection, pid: int, seconds: float) -> tuple[bool, Any]:
    """What the child sends in the end, unless it is over its time.

    RLIMIT_CPU would do this, but where Linux keeps it, process_time goes by ticks of 4 ms.
    """
    began, since = used(pid), time.monotonic()
    while used(pid) < began + seconds and time.monotonic() < since + HANGS * seconds:
        if here.poll(0.1):
            message = here.recv()
            if message is not None:
                return message
            began, since = used(pid), time.monotonic()
    return False, f"over {seconds:.0f} s"


def used(pid: int) -> float:
    """Seconds of CPU."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def timed(call: Callable[[], Any], begin: Begin) -> tuple[Any, float]:
    begin()
    start = time.process_time()
    value = call()
    return value, time.process_time() - start


SMALL = (Run(1.05, 0.011, 50),)


def once(engine: Engine, config: Config, seconds: float, alike: bool) -> tuple[Answer, float]:
    """One contained call, after one on another log: as much like it as can be, or a small one."""

    def task(begin: Begin) -> tuple[Answer, float]:
        start = time.process_time()
        for more in range(1, WARM + 1):
            near = tuple(run._replace(noise=run.noise * (1 + more / 1000)) for run in config.runs)
            try:
                engine.prepare(near if alike else SMALL)(config.delta)
            except Exception:
                gc.collect()  # the call itself will fail again, and say so
            if not alike or time.process_time() - start > WARM_SECONDS:
                break
        (lower, upper), spent = timed(partial(engine.prepare(config.runs), config.delta), begin)
        lower = None if lower is None or math.isnan(lower) else float(lower)
        if not math.isfinite(upper):
            raise Failed(f"epsilon {float(upper)}")
        return (lower, float(upper)), spent

    return contained(task, seconds)


def measure(
    engines: Sequence[Engine], config: Config, *, repeats: int, seconds: float
) -> dict[str, dict[str, Any]]:
    """By contestant: its bounds and CPU times, or why there are none."""
    found: dict[str, dict[str, Any]] = {}
    times: dict[str, list[float]] = {}
    fast: list[tuple[Engine, bool]] = []
    for engine in engines:
        if not engine.offers(config.runs):
            found[engine.name] = {"not_offered": True}
            continue
        try:
            (lower, upper), spent = once(engine, config, seconds, alike=False)
        except Failed as failed:
            found[engine.name] = {"failed": str(failed)}
            continue
        found[engine.name] = {"lower": lower, "upper": upper}
        times[engine.name] = [spent]
        if spent < SLOW and repeats > 1:
            fast.append((engine, spent < SLOW / 10))
            times[engine.name] = []
    for _ in range(repeats):
        for engine, alike in fast:
            try:
                times[engine.name].append(once(engine, config, seconds, alike)[1])
            except Failed as failed:
                found[engine.name] = {"failed": str(failed)}
    for name, spent in times.items():
        if "failed" not in found[name]:
            found[name]["cpu"] = spread(spent)
    return found


def spread(times: list[float]) -> dict[str, float]:
    return {
        "median": statistics.median(times),
        "min": min(times),
        "max": max(times),
        "repeats": len(times),
    }


# --- truth


class Truth(NamedTuple):
    lower: float
    upper: float
    source: str


def interval(runs: tuple[Run, ...], delta: float) -> tuple[float, float]:
    """dpfunc's, from a process of its own, so that nothing of it is kept here."""

    def task(_: Begin) -> tuple[float, float]:
        lower, upper = epsilon_bounds(log_of(runs), delta=delta)
        return float(lower), float(upper)

    return contained(task, LIMIT)


def check_vectors() -> dict[tuple[tuple[Run, ...], float], Truth]:
    """dpfunc's interval contains every reference, to the reference's own accuracy."""
    known = {}
    for vector in vectors():
        runs, delta, reference = runs_of(vector), vector["delta"], vector["eps_ref"]
        lower, upper = interval(runs, delta)
        if not (lower <= vector["eps_upper"] and upper >= vector["eps_lower"]):
            raise AssertionError(
                f"{vector['id']}: [{lower!r}, {upper!r}] misses the reference {reference!r}"
            )
        known[runs, delta] = Truth(reference, reference, f"reference {vector['id']}")
    return known


def truth_of(config: Config, references: dict[Any, Truth]) -> Truth:
    """The reference, else dpfunc's interval, else, where that is wider than 1e-5, what is known."""
    lower, upper = interval(config.runs, config.delta)
    known = Truth(config.known * (1 - DIGITS), config.known * (1 + DIGITS), "known to six digits")
    if not (lower <= known.upper and upper >= known.lower):
        raise AssertionError(f"{config.name}: [{lower}, {upper}] is not the known {config.known}")
    certified = Truth(lower, upper, "dpfunc's interval")
    close = upper - lower <= 1e-5 * lower
    return references.get((config.runs, config.delta), certified if close else known)


def judged(answer: dict[str, Any], truth: Truth) -> dict[str, Any]:
    """With its excess over the truth, and whether it under-reports."""
    if "upper" not in answer:
        return answer
    middle = (truth.lower + truth.upper) / 2
    return {
        **answer,
        "excess": answer["upper"] / middle - 1,
        "under_reports": answer["upper"] < truth.lower * (1 - UNDER),
    }


# --- the parts


def grid_row(engines: Sequence[Engine], config: Config, truth: Truth, **how: Any) -> dict[str, Any]:
    found = measure(engines, config, **how)
    return {
        "config": config.name,
        "delta": config.delta,
        "runs": len(config.runs),
        "steps": sum(run.steps for run in config.runs),
        "truth": truth._asdict(),
        "engines": {name: judged(answer, truth) for name, answer in found.items()},
    }


def summary(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """By contestant, over the logs that it offers to account for."""
    table: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(name for row in rows for name in row["engines"]):
        answers = [row["engines"][name] for row in rows if name in row["engines"]]
        offered = [answer for answer in answers if "not_offered" not in answer]
        given = [answer for answer in offered if "cpu" in answer]
        times = sorted(answer["cpu"]["median"] for answer in given)
        excess = sorted(answer["excess"] for answer in given if "excess" in answer)
        widths = [a["upper"] - a["lower"] for a in given if a["lower"] is not None]
        table[name] = {
            "logs": len(answers),
            "offered": len(offered),
            "failed": len(offered) - len(given),
            "under_reports": sum(answer.get("under_reports", False) for answer in given),
            "least_excess": excess[0] if excess else None,
            "median_excess": statistics.median(excess) if excess else None,
            "worst_excess": excess[-1] if excess else None,
            "median_width": statistics.median(widths) if widths else None,
            "median_cpu": statistics.median(times) if times else None,
            "p90_cpu": float(np.quantile(times, 0.9)) if times else None,
            "max_cpu": times[-1] if times else None,
        }
    return table


class Target(NamedTuple):
    epsilon: float
    prob: float
    steps: int
    delta: float = 1e-5


TARGETS = (
    Target(1.0, 0.01, 10_000),
    Target(3.0, 256 / 60000, 14_062),
    Target(8.0, 0.01, 1000),
)


def calibrate_dpfunc(accountant: str, target: Target) -> float:
    return calibrate_noise_multiplier(
        target_epsilon=target.epsilon,
        delta=target.delta,
        sampling_prob=target.prob,
        num_steps=target.steps,
        accountant=accountant,
    )


def calibrate_opacus(accountant: str, target: Target) -> float:
    return importlib.import_module("opacus.accountants.utils").get_noise_multiplier(
        target_epsilon=target.epsilon,
        target_delta=target.delta,
        sample_rate=target.prob,
        steps=target.steps,
        accountant=accountant,
    )


def calibrate_google(accountant: str, target: Target) -> float:
    library = importlib.import_module("dp_accounting")
    calibration = importlib.import_module("dp_accounting.mechanism_calibration")
    return library.calibrate_dp_mechanism(
        partial(google_accountant, accountant),
        lambda noise: library.SelfComposedDpEvent(
            google_event(Run(noise, target.prob, 1)), target.steps
        ),
        target.epsilon,
        target.delta,
        calibration.ExplicitBracketInterval(0.5, 8.0),
    )


def calibrate_microsoft(target: Target) -> float:
    find = importlib.import_module("prv_accountant.dpsgd").find_noise_multiplier
    return find(target.prob, target.steps, target.epsilon, target.delta)


CALIBRATIONS: dict[str, Callable[[Target], float]] = {
    "dpfunc pld": partial(calibrate_dpfunc, "pld"),
    "dpfunc rdp": partial(calibrate_dpfunc, "rdp"),
    "opacus rdp": partial(calibrate_opacus, "rdp"),
    "opacus gdp": partial(calibrate_opacus, "gdp"),
    "opacus prv": partial(calibrate_opacus, "prv"),
    "dp-accounting rdp": partial(calibrate_google, "rdp"),
    "dp-accounting pld": partial(calibrate_google, "pld"),
    "prv_accountant": calibrate_microsoft,
}


def least_noise(target: Target) -> float:
    """Of those whose certified epsilon is within the target, to 1e-12."""

    def fits(noise: float) -> bool:
        upper = dpfunc_pld((Run(noise, target.prob, target.steps),))(target.delta)[1]
        return upper <= target.epsilon

    def search(_: Begin) -> float:
        low, high = 0.1, 100.0
        while high / low > 1 + 1e-12:
            middle = math.sqrt(low * high)
            low, high = (low, middle) if fits(middle) else (middle, high)
        return high

    return contained(search, LIMIT)


def calibration_row(
    engines: Sequence[Engine], target: Target, *, repeats: int, seconds: float
) -> dict[str, Any]:
    least = least_noise(target)
    near = target._replace(epsilon=target.epsilon * 1.001)
    found: dict[str, dict[str, Any]] = {}
    for name in (engine.name for engine in engines if engine.name in CALIBRATIONS):
        calibrate = CALIBRATIONS[name]

        def task(
            calibrate: Callable[[Target], float], warm: bool, begin: Begin
        ) -> tuple[float, float]:
            if warm:
                calibrate(near)
            return timed(lambda: float(calibrate(target)), begin)

        try:
            noise, spent = contained(partial(task, calibrate, False), seconds)
            times = [spent]
            if spent < SLOW and repeats > 1:
                times = [
                    contained(partial(task, calibrate, True), seconds)[1] for _ in range(repeats)
                ]
        except Failed as failed:
            found[name] = {"failed": str(failed)}
            continue
        lower, upper = interval((Run(noise, target.prob, target.steps),), target.delta)
        found[name] = {
            "noise_multiplier": noise,
            "excess": noise / least - 1,
            "epsilon": [lower, upper],
            "violates": lower > target.epsilon * (1 + UNDER),
            "cpu": spread(times),
        }
    return {"target": target._asdict(), "least_noise_multiplier": least, "engines": found}


SIZES = (10**3, 10**4, 10**5, 10**6)
KINDS: dict[str, Callable[[int], tuple[Run, ...]]] = {
    # Noise from 2 to 1, so that every size spends a like epsilon.
    "distinct noise": lambda n: tuple(
        Run(float(noise), 0.32 / math.sqrt(n), 1) for noise in np.linspace(2.0, 1.0, n)
    ),
    # Probabilities that grow fourfold and take another turn through their range than noise does.
    "distinct noise and probability": lambda n: tuple(
        Run(float(noise), float(prob), 1)
        for noise, prob in zip(
            np.linspace(2.0, 1.0, n),
            np.geomspace(0.16, 0.64, n)[np.arange(n) * 7919 % n] / math.sqrt(n),
            strict=True,
        )
    ),
}

OTHER_DELTAS = (1.1e-5, 1e-4, 1e-6, 1e-7, 1e-8)


def large(engines: Sequence[Engine], seconds: float) -> list[dict[str, Any]]:
    """Logs of ever more distinct steps, until a contestant fails: to build the log in its own types,
    the first epsilon, and the median of those at other deltas from the same object.
    """
    rows: list[dict[str, Any]] = []
    for kind, make in KINDS.items():
        going = [engine for engine in engines if engine.offers is not one_gaussian]
        for size in SIZES:
            runs = make(size)
            found: dict[str, dict[str, Any]] = {}
            for engine in going:

                def task(engine: Engine, runs: tuple[Run, ...], begin: Begin) -> dict[str, Any]:
                    engine.prepare(SMALL)(1e-5)
                    call, build = timed(partial(engine.prepare, runs), begin)
                    (lower, upper), first = timed(partial(call, 1e-5), begin)
                    if not math.isfinite(upper):
                        raise Failed(f"epsilon {float(upper)}")
                    again: list[float] = []
                    for delta in OTHER_DELTAS:
                        again.append(timed(partial(call, delta), begin)[1])
                        if sum(again) > 1:
                            break
                    lower = None if lower is None else float(lower)
                    cpu = {"build": build, "first": first, "again": statistics.median(again)}
                    return {"lower": lower, "upper": float(upper), "cpu": cpu}

                try:
                    found[engine.name] = contained(partial(task, engine, runs), seconds)
                except Failed as failed:
                    found[engine.name] = {"failed": str(failed)}
                print(f"{size:.0e} {kind}, {engine.name}: {found[engine.name]}", flush=True)
            going = [engine for engine in going if "failed" not in found[engine.name]]
            rows.append({"kind": kind, "size": size, "engines": found})
    return rows


# --- the whole


def described() -> dict[str, Any]:
    names = ("scipy", "dp-accounting", "prv-accountant")
    modules = {
        "scipy": "scipy",
        "dp-accounting": "dp_accounting",
        "prv-accountant": "prv_accountant",
    }
    known = [name for name in names if importlib.util.find_spec(modules[name])]
    return {**machine("cpu"), **{name: version(name) for name in known}, "threads": 1}


def laid_over(
    old: list[dict[str, Any]], new: dict[str, Any], key: str, partial: bool
) -> list[dict[str, Any]]:
    """`new` in the place of the row of the same key, with the contestants that only that has."""
    places = [row[key] for row in old]
    if new[key] not in places:
        return [*old, new]
    before = old[places.index(new[key])]
    if partial:
        new = {**new, "engines": before["engines"] | new["engines"]}
    return [new if row is before else row for row in old]


def print_row(what: str, engines: dict[str, dict[str, Any]]) -> None:
    print(what, flush=True)
    for name, answer in engines.items():
        if "cpu" not in answer:
            print(f"  {name}: {answer.get('failed', 'not offered')}")
            continue
        value = answer.get("upper", answer.get("noise_multiplier"))
        excess = f" ({answer['excess']:+.2%})" if "excess" in answer else ""
        wrong = answer.get("under_reports") or answer.get("violates")
        mark = " UNDER-REPORTS" if wrong else ""
        print(f"  {name}: {value:.6g}{excess}, {answer['cpu']['median'] * 1e3:.3g} ms{mark}")


def main() -> None:
    one = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    if any(os.environ.get(name) != value for name, value in one.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **one})
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="regular expression on contestants")
    parser.add_argument("--configs", default="", help="regular expression on logs")
    parser.add_argument(
        "--quick", action="store_true", help=f"one call, at most {QUICK:.0f} s; nothing is written"
    )
    parser.add_argument("--large", action="store_true", help="only logs of many distinct steps")
    options = parser.parse_args()
    how = (
        {"repeats": 1, "seconds": QUICK}
        if options.quick
        else {"repeats": REPEATS, "seconds": LIMIT}
    )

    def chosen(every: Sequence[Engine]) -> list[Engine]:
        return [engine for engine in importable(every) if re.search(options.only, engine.name)]

    engines = chosen(ENGINES)
    for engine in engines:
        engine.prepare(SMALL)  # imports what it needs here, once
    gc.collect()
    gc.freeze()  # or a collection in the midst of a call would go through all of torch
    references = check_vectors()
    print(f"dpfunc's interval contains all {len(references)} references", flush=True)
    if options.large:
        rows = large(engines, how["seconds"])
        if not options.quick:
            print(f"wrote {write('accounting-large-cpu', {'machine': described(), 'rows': rows})}")
        return
    path = RESULTS / "accounting-cpu.json"
    result: dict[str, Any] = {"rows": [], "ladder": [], "calibration": []}
    if path.exists() and not options.quick:
        result = json.loads(path.read_text())
    every = configs()
    truths = {config.name: truth_of(config, references) for config in every}

    def add(part: str, key: str, row: dict[str, Any]) -> None:
        result[part] = laid_over(result[part], row, key, bool(options.only))
        if not options.quick:
            # After every row, so that a run that is stopped keeps what it has.
            order = [config.name for config in every]
            result["rows"].sort(key=lambda row: order.index(row["config"]))
            result["summary"] = summary(result["rows"])
            result["machine"] = described()
            write("accounting-cpu", result)

    for config in every:
        if re.search(options.configs, config.name):
            truth = truths[config.name]
            row = grid_row(engines, config, truth, **how)
            print_row(f"{config.name}: {truth}", row["engines"])
            add("rows", "config", row)
    if not options.configs:
        config = next(config for config in every if config.name == LADDER_CONFIG)
        row = grid_row(chosen(LADDER), config, truths[LADDER_CONFIG], **how)
        print_row(f"{config.name}, both bounds", row["engines"])
        add("ladder", "config", row)
        for target in TARGETS:
            row = calibration_row(engines, target, **how)
            print_row(f"{target}, least noise {row['least_noise_multiplier']}", row["engines"])
            add("calibration", "target", row)
    print(json.dumps(summary(result["rows"]), indent=1))
    if not options.quick:
        print(f"wrote {path}; ./dev bench report draws it")


if __name__ == "__main__":
    main()
