"""Pictures: each draws the numbers that the library gives, and what is PRIVATE says so."""

from dataclasses import replace

import numpy as np
import pytest
from matplotlib.figure import Figure

from dpfunc import StepEvent, delta, epsilon, plots, remaining

STEP = StepEvent(noise_multiplier=1.0, sampling_prob=0.01)
LOG = (replace(STEP, count=400), replace(STEP, noise_multiplier=0.8, count=600))


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Draws, and hands back the figure that was saved."""
    saved = []
    real = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda f, *a, **k: saved.append(f) or real(f, *a, **k))

    def draw(picture, *arguments, **options):
        picture(tmp_path / "picture.png", *arguments, **options)
        assert (tmp_path / "picture.png").read_bytes()[:4] == b"\x89PNG"
        return saved.pop()

    return draw


def curves(figure, axes=0):
    return {line.get_label(): line.get_xydata() for line in figure.axes[axes].lines}


def legends_of(figure):
    return [text.get_text() for axes in figure.axes for text in axes.get_legend().get_texts()]


def test_the_profile_is_between_its_bounds(drawn):
    figure = drawn(plots.draw_profile, LOG, title="a title")
    upper, lower = curves(figure)["upper bound"], curves(figure)["lower bound"]
    np.testing.assert_allclose(upper[:, 1], delta(LOG, epsilon=upper[:, 0]), rtol=1e-9)
    assert (lower[:, 1] <= upper[:, 1]).all()
    assert figure.get_suptitle() == "a title"
    assert (figure.axes[0].get_xlabel(), figure.axes[0].get_ylabel()) == ("epsilon", "delta")


def test_the_trade_off_is_below_the_line_of_no_information(drawn):
    found = curves(drawn(plots.draw_trade_off, LOG))
    assert found["no information"].tolist() == [[0, 1], [1, 0]]
    wrong, missed = found["no attack is below this"].T
    assert (missed <= 1 - wrong).all()
    assert missed[len(missed) // 2] < 1 - wrong[len(missed) // 2]


@pytest.mark.parametrize(("target", "goes_on"), [(3.0, True), (1.5, False), (2.0, False)])
def test_the_budget_is_passed_after_the_last_step_within_it(drawn, target, goes_on):
    figure = drawn(plots.draw_budget, LOG, delta=1e-5, target_epsilon=target)
    (label,) = (text for text in legends_of(figure) if "last step" in text)
    last = int(label.split(": ")[1])
    found = curves(figure)
    assert ("to come" in found) == goes_on == (last > 1000)

    def first(steps):
        counts = min(steps, 400), max(0, steps - 400)
        return [replace(e, count=n) for e, n in zip(LOG, counts, strict=True)]

    assert epsilon(tuple(first(last)), delta=1e-5) <= target
    assert epsilon(tuple(first(last + 1)), delta=1e-5) > target
    if goes_on:
        assert last - 1000 == remaining(LOG, LOG[1], target_epsilon=target, delta=1e-5)
    for steps, spent in found["spent"][::10]:
        assert spent == epsilon(tuple(first(int(steps))), delta=1e-5)
    assert found["spent"][-1][0] == 1000


def test_a_budget_that_is_never_passed_and_one_that_is_passed_at_once(drawn):
    silent = (replace(STEP, noise_multiplier=float("inf"), count=10),)
    far = drawn(plots.draw_budget, silent, delta=1e-5, target_epsilon=1.0)
    assert curves(far)["to come"][-1][0] == 40
    assert not any("last step" in text for text in legends_of(far))
    loud = (replace(STEP, noise_multiplier=0.0, sampling_prob=1.0, count=10),)
    at_once = drawn(plots.draw_budget, loud, delta=1e-5, target_epsilon=1.0)
    assert "last step within it: 0" in legends_of(at_once)


def test_without_a_budget_what_was_spent_is_drawn(drawn):
    assert legends_of(drawn(plots.draw_budget, LOG, delta=1e-5)) == ["spent"]


def test_an_empty_log_has_no_budget(tmp_path):
    with pytest.raises(ValueError, match="at least one step"):
        plots.draw_budget(tmp_path / "x.png", (), delta=1e-5)


def test_planning_shows_noise_that_meets_its_targets(drawn):
    figure = drawn(
        plots.draw_planning, sampling_prob=0.01, num_steps=100, delta=1e-5, relation="replace_one"
    )
    (line,) = figure.axes[0].lines
    for target, noise in line.get_xydata()[::6]:
        run = replace(STEP, noise_multiplier=noise, count=100, relation="replace_one")
        assert target * (1 - 1e-6) <= epsilon((run,), delta=1e-5) <= target


def test_norms_are_marked_private_and_keep_out_what_is_not_finite(drawn):
    norms = [0.0, 0.5, 2.0, float("nan"), float("inf")]
    figure = drawn(plots.draw_norms, norms, l2_clip_norm=1.0)
    assert figure.axes[0].get_title().startswith("PRIVATE")
    assert sum(bar.get_height() for bar in figure.axes[0].patches) == 3
    with pytest.raises(ValueError, match="l2_clip_norm"):
        plots.draw_norms("x.png", norms, l2_clip_norm=0)


def test_a_run_without_finite_norms_is_drawn(drawn):
    figure = drawn(
        plots.draw_run,
        steps=[1, 2],
        accuracy=[0.1, 0.2],
        epsilon=[1.0, 2.0],
        norms=[],
        l2_clip_norm=1.0,
        title="a run",
    )
    assert any(axes.get_title().startswith("PRIVATE") for axes in figure.axes)
