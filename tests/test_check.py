"""`check_private`: sound losses pass, and each way to be unsound is found by the check that is for it."""

import math
import random as chance
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dpfunc import (
    DPSGD,
    AdaptiveClipping,
    CustomClipping,
    L1Clipping,
    PerGroupClipping,
    check_private,
    functional_loss,
    random,
    trees,
)
from dpfunc.gradients import clipping
from dpfunc.gradients.layers import outer

MECHANISM = DPSGD(clipping=1.0, noise_multiplier=1.0, sampling_prob=0.1, expected_batch_size=4)
DATA = torch.linspace(-2, 2, 15).reshape(5, 3)
START = torch.tensor([0.5, -1.0, 2.0])


def sound(w, x):
    return torch.tanh(w @ x) ** 2


def check(loss=sound, mechanism=MECHANISM, params=START, data=DATA, **options):
    return check_private(loss, params, data, mechanism, **({"compile": False} | options))


def failed(report):
    return [finding.check for finding in report.failed]


@pytest.mark.uses_global_generator  # nn's own initialisation
@pytest.mark.parametrize(
    "clip",
    [
        1.0,
        PerGroupClipping(l2_clip_norms={"0": 0.5, "[35]*": 1.0}),
        L1Clipping(l1_clip_norm=2.0),
        AdaptiveClipping(noise_multiplier=9.0),
    ],
    ids=["flat", "per group", "L1", "adaptive"],
)
def test_a_module_with_dropout_passes(clip):
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Dropout(0.2), nn.Linear(6, 4), nn.Flatten()]
    module = nn.Sequential(*layers, nn.Linear(48, 3))
    loss, params = functional_loss(module, F.cross_entropy, has_key=True)
    data = (torch.randn(4, 1, 8, 8), torch.arange(4) % 3)
    report = check(loss, replace(MECHANISM, clipping=clip), params, data, has_key=True)
    assert report, str(report)
    assert "different for two equal examples" in str(report)


def test_it_compiles_too():
    report = check(compile=True)
    assert report
    assert report.findings[-1].check == "compile"


def test_it_prints_as_a_table():
    lines = str(check()).splitlines()
    assert lines[0].split() == ["runs", "ok", "a", "scalar", "for", "each", "of", "5", "examples"]
    assert lines[-1] == "10 of 10 checks passed"
    assert repr(check()) == str(check())


class Counter:
    """A loss with a state of its own."""

    def __init__(self):
        self.calls = 0

    def __call__(self, w, x):
        self.calls += 1
        return self.calls * (w @ x)


def over_the_batch(w, x):
    return (w @ x - DATA.mean()) ** 2


def in_the_order_of_the_batch(w, x):
    whole = x
    while torch._C._functorch.is_functorch_wrapped_tensor(whole):  # past vmap
        whole = torch._C._functorch.get_unwrapped(whole)
    return (w @ x) * whole.mean()


@pytest.mark.parametrize(
    ("loss", "check_name", "words"),
    [
        (over_the_batch, "closes over no data", "the loss reaches DATA"),
        (in_the_order_of_the_batch, "examples kept apart", "moves the gradient of example"),
        (Counter(), "examples kept apart", "moves the gradient of example"),
        (lambda w, x: (w * 0.0) @ x, "runs", "every gradient is 0"),
        (lambda w, x: w * x, "runs", "scalar"),
        (lambda w, x: (w @ x).item(), "runs", "branch or an .item"),
        (lambda w, x: (w @ x) * torch.rand(()), "runs", "random operation"),
        (
            lambda w, x: torch.sqrt(w @ x) if w.dtype == torch.float64 else w @ x,
            "dtypes",
            "float64",
        ),
    ],
)
def test_an_unsound_loss_is_found(loss, check_name, words):
    report = check(loss)
    assert not report
    assert check_name in failed(report), str(report)
    told = next(finding.told for finding in report.failed if finding.check == check_name)
    assert words in told


def test_a_loss_that_writes_to_its_data_is_found():
    report = check(lambda w, x: (x.mul_(0.5) * w).sum(), data=DATA.clone())
    assert "purity" in failed(report)


def test_what_draws_past_its_key_is_found():
    report = check(lambda w, x, key: w @ x, has_key=True)
    assert report
    assert "do not depend on the key" in str(report)
    assert "randomness" in failed(check(lambda w, x, key: (w @ x) * chance.random(), has_key=True))

    def alike(w, x, key):
        return (w @ x) * random.uniform(random.key(5), ()) + 0 * key.sum()

    assert check(alike, has_key=True)  # one draw for all, and so no randomness at all


@pytest.mark.parametrize(
    ("broken", "check_name"),
    [
        ("norms are not bounds", "bounded contribution"),
        ("the mask is left out", "poison and padding"),
        ("poison is multiplied by zero", "poison and padding"),
    ],
)
def test_a_broken_library_is_found_too(monkeypatch, broken, check_name):
    if broken == "norms are not bounds":
        bound = clipping._norm_bound
        monkeypatch.setattr(clipping, "_norm_bound", lambda *a: bound(*a) * 0.9)
    elif broken == "the mask is left out":
        decide = clipping.decide
        monkeypatch.setattr(clipping, "decide", lambda rule, norms, mask: decide(rule, norms, None))
    else:
        monkeypatch.setattr(
            clipping,
            "scaled",
            lambda leaf, s, keep: (
                leaf * clipping.lowered(s * keep, leaf.dtype).reshape(-1, *[1] * (leaf.ndim - 1))
            ),
        )
    assert check_name in failed(check())


def test_a_gram_norm_without_its_margin_is_found(monkeypatch):
    def loss(w, x):
        return F.linear(x, w).square().sum()

    w, data = torch.eye(6), torch.linspace(-1, 1, 60).reshape(5, 2, 6)
    assert check(loss, params=w, data=data)
    bound = outer.bound
    monkeypatch.setattr(outer, "bound", lambda *a, **k: bound(*a, **k) * 0.9)
    assert "bounded contribution" in failed(check(loss, params=w, data=data))


def test_a_rule_that_looks_at_no_one_else_is_no_matter_what_it_says():
    rule = CustomClipping(
        scales=lambda norms: trees.map(lambda n: 1e9 / (1e-9 + n), norms), sensitivity=1.0
    )
    assert check(mechanism=replace(MECHANISM, clipping=rule))


def test_integers_are_left_what_they_are():
    table = random.normal(random.key(0), (7, 3))

    def loss(params, tokens):
        return params["e"][tokens].sum(0).square().sum()

    report = check(loss, params={"e": table}, data=torch.arange(20).reshape(5, 4) % 7)
    assert report, str(report)
    assert "no floating-point data" in str(report)


def test_bad_arguments_are_refused():
    with pytest.raises(TypeError, match="DPSGD"):
        check(mechanism=1.0)
    with pytest.raises(ValueError, match="at least two examples"):
        check(data=DATA[:1])


def test_it_needs_no_hypothesis():
    code = "import sys; sys.modules['hypothesis'] = None; from dpfunc import check_private"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_nan_parameters_are_a_finding_and_no_error():
    assert isinstance(bool(check(params=START * math.nan)), bool)
