"""Runs: a fold over steps, a budget, and files that survive a kill, byte for byte."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
from collections import deque
from dataclasses import replace
from decimal import Decimal
from operator import itemgetter
from pathlib import Path
from types import MappingProxyType

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import nn

import killed_run
from dpfunc import (
    DPSGD,
    ClipFraction,
    Saving,
    StepEvent,
    TrainState,
    append,
    epsilon,
    fit,
    functional_loss,
    load_checkpoint,
    make_train_step,
    optimizers,
    poisson_batches,
    random,
    read_log,
    save_checkpoint,
    schedules,
    train,
    trees,
    verify_log,
)
from dpfunc.training import fingerprint, run

KEY = random.key(4)
MECHANISM = DPSGD(clipping=1.0, noise_multiplier=1.0, sampling_prob=0.3, expected_batch_size=6)
DATA = torch.linspace(-1, 1, 60).reshape(20, 3)
START = torch.zeros(3)


def loss(w, x):
    return (w @ x - x.sum()) ** 2


def pair(mechanism=MECHANISM, rate=0.1, of=loss):
    return make_train_step(of, mechanism, optimizers.adam(rate))


def fitted(folder=None, made=None, mechanism=MECHANISM, num_steps=12, every=5, **options):
    saving = options.pop("saving", None) or (Saving(folder=folder, every=every) if folder else None)
    options = {"key": KEY, "delta": 1e-5, "progress": False, "data": DATA} | options
    return fit(
        made or pair(mechanism),
        START,
        mechanism=mechanism,
        num_steps=num_steps,
        saving=saving,
        **options,
    )


class Notes(list):
    """What a step of a test writes down, and which is no part of what the step is."""

    is_cache = True


def same_bits(a, b):
    return all(x.equal(y) for x, y in zip(trees.leaves(a), trees.leaves(b), strict=True))


class TestLoop:
    def test_train_is_the_loop_that_a_user_writes(self):
        mechanism = replace(
            MECHANISM,
            noise_multiplier=schedules.exponential(2.0, decay=0.9, num_steps=6),
            telemetry=(ClipFraction(noise_multiplier=5.0),),
        )
        init, step = pair(mechanism)
        state, log, metrics = init(START), (), []
        for batch in poisson_batches(DATA, KEY, mechanism, num_steps=6):
            state, _ = step(state, batch, KEY)
            log = append(log, mechanism.event(batch.step))
            metrics.append(state.mechanism["clip_fraction"].item())
        batches = poisson_batches(DATA, KEY, mechanism, num_steps=6)
        done = list(train(step, init(START), batches, KEY, mechanism))
        assert same_bits(done[-1].state, state)
        assert [d.metrics["clip_fraction"] for d in done] == metrics
        assert sum((append((), d.event) for d in done), append((), done[0].event)[:0]) == log

    def test_a_batch_comes_once(self):
        init, step = pair()
        batches = list(poisson_batches(DATA, KEY, MECHANISM, num_steps=3))
        with pytest.raises(ValueError, match="batch of step 3, got that of 0"):
            list(train(step, init(START), batches * 2, KEY, MECHANISM))

    @pytest.mark.parametrize(
        "other", [{"noise_multiplier": 100.0}, {"relation": "replace_one"}, {"sampling_prob": 0.1}]
    )
    def test_the_log_takes_no_other_mechanism_than_the_steps(self, other):
        with pytest.raises(ValueError, match="a step of this mechanism"):
            fitted(made=pair(replace(MECHANISM, **other)))

    def test_fit_is_that_loop_too(self):
        init, step = pair()
        batches = poisson_batches(DATA, KEY, MECHANISM, num_steps=12)
        *_, last = train(step, init(START), batches, KEY, MECHANISM)
        result = fitted()
        assert same_bits(result.state, last.state)
        assert result.params.equal(last.state.params)
        assert result.log == (replace(MECHANISM.event(), count=12),)
        assert result.epsilon == epsilon(result.log, delta=1e-5)
        assert result.stopped == "done"

    def test_no_steps_release_nothing(self):
        result = fitted(num_steps=0)
        assert result.epsilon == 0.0
        assert result.params.equal(START)

    def test_what_is_evaluated_is_kept_with_its_step(self):
        result = fitted(evaluate=lambda state: {"size": state.params.norm()}, evaluate_every=5)
        assert [row["step"] for row in result.history] == [5, 10, 12]
        assert result.history[-1]["epsilon"] == result.epsilon
        assert result.history[-1]["size"] == pytest.approx(result.params.norm().item())

    def test_a_fresh_key_every_time(self):
        assert not fitted(key=None).params.equal(fitted(key=None).params)

    def test_batch_options_reach_the_sampler(self):
        with pytest.raises(ValueError, match="pad_to_multiple_of"):
            fitted(pad_to_multiple_of=0)

    def test_the_bar_shows_epsilon_and_metrics_and_no_loss(self, capsys):
        fitted(progress=True, evaluate=lambda state: {"held_out": 0.25}, evaluate_every=1)
        shown = capsys.readouterr().err
        assert "12/12" in shown
        assert f"epsilon {fitted().epsilon:.4g}" in shown
        assert "held_out 0.25" in shown
        assert "examples/s" in shown
        assert "loss" not in shown


class TestBudget:
    @given(st.floats(3.0, 8.0), st.integers(1, 9))
    @settings(max_examples=15)
    def test_it_stops_before_the_budget_is_passed_and_not_a_step_earlier(self, target, every):
        result = fitted(num_steps=40, target_epsilon=target)
        assert result.epsilon <= target
        more = append(result.log, MECHANISM.event())
        assert result.stopped == ("budget" if int(result.state.step) < 40 else "done")
        assert int(result.state.step) == 40 or epsilon(more, delta=1e-5) > target

    def test_it_counts_schedules(self):
        falling = schedules.exponential(3.0, decay=0.9, num_steps=40)
        mechanism = replace(MECHANISM, noise_multiplier=falling)
        result = fitted(mechanism=mechanism, num_steps=40, target_epsilon=5.0)
        steps = int(result.state.step)
        assert list(result.log) == [mechanism.event(t) for t in range(steps)]
        assert epsilon(append(result.log, mechanism.event(steps)), delta=1e-5) > 5.0

    def test_a_budget_that_is_spent_at_the_start_is_told(self):
        with pytest.raises(ValueError, match=r"target_epsilon=0.1 to last for one step.*costs 2\."):
            fitted(target_epsilon=0.1)

    def test_a_run_that_used_its_budget_says_so_again(self, tmp_path):
        first = fitted(tmp_path, num_steps=100, target_epsilon=4.0)
        again = fitted(tmp_path, num_steps=100, target_epsilon=4.0)
        assert first.stopped == again.stopped == "budget"
        assert first.epsilon == again.epsilon
        assert same_bits(first.state, again.state)


class TestFiles:
    def test_a_run_in_a_folder_is_the_run_without(self, tmp_path):
        kept, loose = fitted(tmp_path / "a" / "b"), fitted()
        assert same_bits(kept.state, loose.state)
        assert kept.log == loose.log == read_log(tmp_path / "a" / "b" / run.LOG)
        assert verify_log(tmp_path / "a" / "b" / run.LOG)

    def test_it_goes_on_where_it_ended(self, tmp_path):
        fitted(tmp_path, num_steps=8)
        longer = fitted(tmp_path, num_steps=12, key=None)
        assert same_bits(longer.state, fitted().state)
        assert longer.log == fitted().log

    def test_the_history_goes_along(self, tmp_path):
        options = {"evaluate": lambda state: {"size": state.params.norm()}, "evaluate_every": 3}
        fitted(tmp_path, num_steps=6, **options)
        assert fitted(tmp_path, **options).history == fitted(**options).history

    def test_every_step_is_on_disk_before_it_runs(self, tmp_path):
        made, seen = pair(), Notes()

        def spying(state, batch, key):
            counted = sum(event.count for event in read_log(tmp_path / run.LOG))
            seen.append(counted >= int(batch.step) + 1)
            return made[1](state, batch, key)

        fitted(tmp_path, made=(made[0], spying))
        assert seen == [True] * 12

    def test_the_key_is_in_one_file_that_its_owner_alone_reads(self, tmp_path):
        key = random.key()
        fitted(tmp_path, key=key)
        assert (tmp_path / run.KEY).stat().st_mode & 0o777 == 0o600
        words = key.numpy().astype("<u4").tobytes()
        for path in tmp_path.iterdir():
            if path.name != run.KEY:
                content = path.read_bytes()
                assert words not in content
                assert words.hex().encode() not in content
                assert not any(str(word).encode() in content for word in key.tolist())

    def test_a_key_that_others_may_read_is_refused(self, tmp_path):
        fitted(tmp_path, num_steps=1)
        os.chmod(tmp_path / run.KEY, 0o644)
        with pytest.raises(PermissionError, match="owner alone, got mode 644"):
            fitted(tmp_path)

    @pytest.mark.parametrize("content", ["", "zz" * 32, "00" * 31])
    def test_a_key_file_that_holds_no_key_is_refused_without_showing_it(self, tmp_path, content):
        fitted(tmp_path, num_steps=1)
        (tmp_path / run.KEY).write_text(content)
        with pytest.raises(ValueError, match="64 hex digits, got something else"):
            fitted(tmp_path)

    def test_ctrl_c_ends_after_the_step_and_the_run_goes_on(self, tmp_path):
        made, armed = pair(), Notes([True])

        def interrupting(state, batch, key):
            if int(batch.step) == 6 and armed:
                armed.pop()
                signal.raise_signal(signal.SIGINT)
            return made[1](state, batch, key)

        changes = Saving(folder=tmp_path, every=5, allow_changes=True)
        before = signal.getsignal(signal.SIGINT)
        stopped = fitted(made=(made[0], interrupting), saving=changes)
        assert signal.getsignal(signal.SIGINT) is before
        assert stopped.stopped == "interrupted"
        assert int(stopped.state.step) == 7
        assert sum(event.count for event in read_log(tmp_path / run.LOG)) == 7
        assert not verify_log(tmp_path / run.LOG).closed
        assert load_checkpoint(tmp_path / run.CHECKPOINT, stopped.state).about["step"] == 7

    def test_a_second_ctrl_c_interrupts_at_once(self):
        made = pair()

        def impatient(state, batch, key):
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            return made[1](state, batch, key)

        with pytest.raises(KeyboardInterrupt):
            fitted(made=(made[0], impatient))

    @pytest.mark.parametrize(
        "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
    )
    def test_a_batch_that_does_not_fit_is_told_what_to_do(self, error):
        def full(state, batch, key):
            raise error

        with pytest.raises(type(error)) as caught:
            fitted(made=(pair()[0], full))
        assert "chunk_size=32" in caught.value.__notes__[0]

    def test_a_folder_that_cannot_be_written_releases_nothing(self, tmp_path):
        made, ran = pair(), []

        def counting(state, batch, key):
            ran.append(int(batch.step))
            return made[1](state, batch, key)

        (tmp_path / "file").write_text("")
        with pytest.raises(OSError, match="file"):
            fitted(tmp_path / "file" / "run", made=(made[0], counting))
        assert ran == []

    def test_a_full_disk_stops_the_run_before_the_steps_that_it_cannot_declare(
        self, tmp_path, monkeypatch
    ):
        from dpfunc.accounting.steplog import disk

        made, ran, room = pair(), Notes(), [3]
        write = disk.write_at

        def full(file, size, content):
            room[0] -= 1
            if room[0] < 0:
                raise OSError(28, "No space left on device")
            write(file, size, content)

        def counting(state, batch, key):
            ran.append(int(batch.step))
            return made[1](state, batch, key)

        monkeypatch.setattr(disk, "write_at", full)
        with pytest.raises(OSError, match="No space left"):
            fitted(tmp_path, made=(made[0], counting))
        assert ran == list(range(10))
        assert sum(event.count for event in read_log(tmp_path / run.LOG)) == 10
        monkeypatch.setattr(disk, "write_at", write)
        assert same_bits(fitted(tmp_path, made=(made[0], counting)).state, fitted().state)


class TestKills:
    def test_a_run_killed_twenty_times_ends_with_the_same_bits(self, tmp_path):
        steps = 90
        command = [sys.executable, str(Path(killed_run.__file__)), str(tmp_path / "killed")]
        done = subprocess.run(
            [*command, str(steps), "20"],
            check=True,
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert int(done.stdout) == 20
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            whole = killed_run.main(tmp_path / "whole", steps)
        finally:
            torch.set_num_threads(threads)
        loaded = load_checkpoint(tmp_path / "killed" / run.CHECKPOINT, whole.state)
        assert same_bits(loaded.state, whole.state)
        assert loaded.about["attempt"] == 0
        log = read_log(tmp_path / "killed" / run.LOG)
        assert log == whole.log
        assert epsilon(log, delta=1e-5) >= whole.epsilon
        assert loaded.about["history"] == whole.history
        assert verify_log(tmp_path / "killed" / run.LOG)

    test_a_run_killed_twenty_times_ends_with_the_same_bits = pytest.mark.uses_global_generator(
        test_a_run_killed_twenty_times_ends_with_the_same_bits
    )


class Stop(BaseException):
    pass


def cut_short(folder, at=7, **options):
    """A run that dies in the middle of an interval, as a kill would end it."""
    init, step = pair()

    def dying(state, batch, key):
        if int(batch.step) == at and dying.armed:
            raise Stop
        return step(state, batch, key)

    dying.armed = True
    with pytest.raises(Stop):
        fitted(folder, made=(init, dying), **options)
    return init, dying


class TestGoingOnDifferently:
    """A step that is run again under the same noise must be the very same step."""

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"made": pair(rate=0.2)}, "changed: code. To"),
            ({"made": pair(of=lambda w, x: (w @ x) ** 2)}, "changed: code. To"),
            ({"data": DATA + 1e-6}, "changed: data. To"),
            ({"pad_to_multiple_of": 3}, "changed: batches. To"),
            (
                {"mechanism": replace(MECHANISM, noise_multiplier=2.0)},
                "mechanism was .*1.0.* and is .*2.0",
            ),
        ],
    )
    def test_a_change_is_refused_and_named(self, tmp_path, change, words):
        fitted(tmp_path, num_steps=7)
        with pytest.raises(ValueError, match=words):
            fitted(tmp_path, **change)

    def test_another_number_of_threads_or_version_is_a_change(self, tmp_path, monkeypatch):
        fitted(tmp_path, num_steps=7)
        monkeypatch.setattr(torch, "get_num_threads", lambda: 99)
        with pytest.raises(ValueError, match=r"threads was .* and is '99'"):
            fitted(tmp_path)

    def test_a_new_attempt_counts_both_and_repeats_no_noise(self, tmp_path):
        still = {"mechanism": MECHANISM, "num_steps": 9}
        made = cut_short(tmp_path, at=7, num_steps=9)
        declared = sum(event.count for event in read_log(tmp_path / run.LOG))
        assert declared == 9
        other = make_train_step(lambda w, x: 0.0 * (w @ x), MECHANISM, optimizers.sgd(1.0))
        assert made is not other
        first = load_checkpoint(tmp_path / run.CHECKPOINT, pair()[0](START))
        assert first.about["step"] == 5

        def noise_of(attempt_key, step):
            return random.derive(attempt_key, random.NOISE, step)

        changed = pair(rate=0.3)
        saving = Saving(folder=tmp_path, every=5, allow_changes=True)
        result = fitted(made=changed, saving=saving, **still)
        attempt = load_checkpoint(tmp_path / run.CHECKPOINT, result.state).about["attempt"]
        assert attempt > 0
        assert sum(event.count for event in read_log(tmp_path / run.LOG)) == 9 + 4
        assert result.epsilon == epsilon((replace(MECHANISM.event(), count=13),), delta=1e-5)
        again = random.fold_in(KEY, attempt)
        assert not any(noise_of(KEY, t).equal(noise_of(again, t)) for t in range(5, 9))
        batches = poisson_batches(DATA, again, MECHANISM, num_steps=9, start=5)
        *_, last = train(changed[1], first.state, batches, again, MECHANISM)
        assert same_bits(last.state, result.state)

    def test_two_forks_of_a_checkpoint_share_no_noise(self, tmp_path):
        import shutil

        fitted(tmp_path / "a", num_steps=5)
        shutil.copytree(tmp_path / "a", tmp_path / "b")
        attempts = set()
        for name, rate in (("a", 0.2), ("b", 0.3)):
            saving = Saving(folder=tmp_path / name, every=5, allow_changes=True)
            result = fitted(made=pair(rate=rate), saving=saving)
            about = load_checkpoint(tmp_path / name / run.CHECKPOINT, result.state).about
            attempts.add(about["attempt"])
        assert len(attempts) == 2

    def test_a_new_attempt_goes_on_as_itself(self, tmp_path):
        fitted(tmp_path, num_steps=5)
        saving = Saving(folder=tmp_path, every=5, allow_changes=True)
        half = fitted(made=pair(rate=0.2), saving=saving, num_steps=8)
        whole = fitted(made=pair(rate=0.2), saving=saving, num_steps=12)
        assert int(half.state.step) == 8
        assert sum(event.count for event in whole.log) == 12

    def test_another_model_is_an_error_that_names_the_leaf(self, tmp_path):
        fitted(tmp_path, num_steps=5)
        with pytest.raises(ValueError, match=r"float32 of shape .4,. at params, got .*3"):
            fit(
                pair(),
                torch.zeros(4),
                DATA,
                MECHANISM,
                KEY,
                num_steps=6,
                delta=1e-5,
                saving=Saving(folder=tmp_path),
                progress=False,
            )

    def test_another_key_is_refused(self, tmp_path):
        fitted(tmp_path, num_steps=5)
        with pytest.raises(ValueError, match=r"got another. Pass key=None"):
            fitted(tmp_path, key=random.key(5))

    def test_another_relation_is_another_run(self, tmp_path):
        fitted(tmp_path, num_steps=5)
        saving = Saving(folder=tmp_path, allow_changes=True)
        with pytest.raises(ValueError, match="relation"):
            fitted(mechanism=replace(MECHANISM, relation="replace_one"), saving=saving)

    @pytest.mark.parametrize(
        ("gone", "kind", "words"),
        [
            (run.KEY, FileNotFoundError, "without which the run cannot go on"),
            (run.CHECKPOINT, ValueError, "beside a log that counts steps, found none"),
            (run.LOG, FileNotFoundError, "Expected a log at"),
        ],
    )
    def test_a_file_that_is_gone_is_told(self, tmp_path, gone, kind, words):
        fitted(tmp_path, num_steps=5)
        (tmp_path / gone).unlink()
        with pytest.raises(kind, match=words):
            fitted(tmp_path)

    def test_a_log_that_lost_lines_is_told(self, tmp_path):
        fitted(tmp_path, num_steps=12)
        lines = (tmp_path / run.LOG).read_text().splitlines(keepends=True)
        (tmp_path / run.LOG).write_text("".join(lines[:2]))
        with pytest.raises(ValueError, match="Lines were lost"):
            fitted(tmp_path)

    def test_an_evaluation_that_changes_the_step_is_told(self, tmp_path):
        module = nn.Sequential(nn.Linear(3, 1), nn.Dropout(0.5))
        loss, params = functional_loss(module, lambda out, y: out.sum() - y.sum(), has_key=True)
        made = make_train_step(loss, MECHANISM, optimizers.sgd(0.1), has_key=True)

        def evaluate(state):
            module.eval()
            return {}

        with pytest.raises(RuntimeError, match=r"leave a module in \.eval\(\)"):
            fit(
                made,
                params,
                (DATA, DATA[:, 0]),
                MECHANISM,
                KEY,
                num_steps=4,
                delta=1e-5,
                evaluate=evaluate,
                saving=Saving(folder=tmp_path, every=2),
                progress=False,
            )

    test_an_evaluation_that_changes_the_step_is_told = pytest.mark.uses_global_generator(
        test_an_evaluation_that_changes_the_step_is_told
    )

    def test_randomness_that_cannot_be_repeated_is_refused(self, tmp_path):
        made = make_train_step(loss, MECHANISM, optimizers.sgd(0.1), randomness="different")
        with pytest.raises(ValueError, match="randomness='different'"):
            fitted(tmp_path, made=made)

    def test_what_is_public_does_not_tell_two_data_sets_apart(self, tmp_path):
        """Whoever has all but one example could try both: a plain hash would say which it was."""
        plain = {fingerprint.of_data(DATA), fingerprint.of_code(pair()[1], MECHANISM)}
        said = set()
        for name, key in (("a", random.key(1)), ("b", random.key(2))):
            fitted(tmp_path / name, key=key, num_steps=1)
            content = (tmp_path / name / run.CHECKPOINT).read_bytes()
            assert not any(digest.encode() in content for digest in plain)
            about = load_checkpoint(tmp_path / name / run.CHECKPOINT, pair()[0](START)).about
            said.add(about["data"])
        assert len(said) == 2


class TestCheckpoints:
    @given(st.data())
    @settings(max_examples=25)
    def test_what_is_loaded_is_what_was_saved(self, tmp_path_factory, data):
        path = tmp_path_factory.mktemp("c") / "c.safetensors"
        dtypes = st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.int64])
        shapes = st.lists(st.integers(0, 3), max_size=3).map(tuple)
        leaves = st.tuples(shapes, dtypes).map(lambda s: torch.ones(s[0], dtype=s[1]) * 3)
        tree = st.recursive(
            leaves | st.floats() | st.integers(-9, 9),
            lambda inner: (
                st.dictionaries(st.text("ab./", max_size=3), inner, max_size=3)
                | st.tuples(inner, inner)
            ),
            max_leaves=5,
        )
        state = TrainState(data.draw(tree), data.draw(tree), {}, torch.tensor(4))
        save_checkpoint(path, state, about={"x": [1, "two"]})
        loaded = load_checkpoint(path, state)
        assert repr(loaded.state) == repr(state)
        assert loaded.about == {"x": [1, "two"]}

    def test_shared_memory_and_views_are_saved_as_values(self, tmp_path):
        w = torch.arange(6.0).reshape(2, 3)
        state = TrainState({"a": w, "b": w.t(), "c": w[:, 1]}, (), {}, w[0, 0])
        save_checkpoint(tmp_path / "c", state)
        assert same_bits(load_checkpoint(tmp_path / "c", state).state, state)

    @pytest.mark.parametrize(
        ("content", "words"),
        [(b"", "damaged"), (b"nonsense" * 9, "damaged"), (None, "format 1, got None")],
    )
    def test_what_is_no_checkpoint_is_told(self, tmp_path, content, words):
        from safetensors.torch import save

        path = tmp_path / "c"
        path.write_bytes(save({"w": torch.ones(2)}) if content is None else content)
        with pytest.raises(ValueError, match=words):
            load_checkpoint(path, TrainState(START, ()))

    def test_a_newer_format_is_told(self, tmp_path, monkeypatch):
        from dpfunc.training import checkpoint

        monkeypatch.setattr(checkpoint, "FORMAT", 2)
        save_checkpoint(tmp_path / "c", TrainState(START, ()))
        monkeypatch.undo()
        with pytest.raises(ValueError, match=r"format 1, got 2. Was it saved by a newer dpfunc"):
            load_checkpoint(tmp_path / "c", TrainState(START, ()))

    @pytest.mark.parametrize(
        ("like", "words"),
        [
            (TrainState({"v": START}, ()), "float32 of shape .3,. at params/'v', got nothing"),
            (TrainState({"w": START.double()}, ()), "float64 .* got torch.float32"),
            (TrainState({"w": torch.zeros(4)}, ()), r"shape \(4,\) at params/'w', got .*\(3,\)"),
            (TrainState({"w": START, "v": START}, ()), "at params/'v', got nothing"),
            (TrainState({}, ()), "nothing at params/'w'"),
        ],
    )
    def test_another_structure_shape_or_dtype_is_told(self, tmp_path, like, words):
        save_checkpoint(tmp_path / "c", TrainState({"w": START}, ()))
        with pytest.raises(ValueError, match=words):
            load_checkpoint(tmp_path / "c", like)

    def test_a_leaf_that_has_no_form_in_a_file_is_told(self, tmp_path):
        with pytest.raises(TypeError, match="got a object at optimizer"):
            save_checkpoint(tmp_path / "c", TrainState(START, object()))

    def test_a_failed_write_leaves_the_old_file(self, tmp_path, monkeypatch):
        save_checkpoint(tmp_path / "c", TrainState(START, ()))
        monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError("full")))
        with pytest.raises(OSError, match="full"):
            save_checkpoint(tmp_path / "c", TrainState(START + 1, ()))
        assert load_checkpoint(tmp_path / "c", TrainState(START, ())).state.params.equal(START)
        assert [path.name for path in tmp_path.iterdir()] == ["c"]


SCALE = 2.0


def scaled(x):
    return SCALE * x


class Doubling:
    def __call__(self, x):
        return 2 * x


class TestFingerprints:
    def test_the_same_program_has_the_same_one_in_another_process(self):
        here = fingerprint.of_code(killed_run.pair()[0][1])
        code = "import killed_run as k; from dpfunc.training import fingerprint as f; print(f.of_code(k.pair()[0][1]))"
        there = subprocess.run(
            [sys.executable, "-c", code],
            check=True,
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parent), "PYTHONHASHSEED": "7"},
        )
        assert there.stdout.strip() == here

    test_the_same_program_has_the_same_one_in_another_process = pytest.mark.uses_global_generator(
        test_the_same_program_has_the_same_one_in_another_process
    )

    def test_compiling_a_step_changes_nothing_of_it(self, tmp_path):
        def compiled():
            torch._dynamo.reset()
            init, step = pair()
            return init, torch.compile(step, fullgraph=True, backend="aot_eager")

        init, step = compiled()
        before = fingerprint.of_code(step)
        fitted(tmp_path / "a", (init, step), num_steps=7)
        assert fingerprint.of_code(step) == before
        resumed = fitted(tmp_path / "a", compiled())
        whole = fitted(tmp_path / "b", compiled())
        assert same_bits(resumed.params, whole.params)
        assert resumed.log == whole.log

    def test_it_does_not_change_while_the_program_runs(self):
        made = pair()
        before = fingerprint.of_code(made[1])
        fitted(made=made)
        assert fingerprint.of_code(made[1]) == before

    def test_what_a_function_reaches_counts(self, monkeypatch):
        def made(constant, frozen):
            return lambda x: scaled(x) + constant + frozen

        base = fingerprint.of_code(made(1.0, START))
        assert fingerprint.of_code(made(1.0, START.clone())) == base
        assert fingerprint.of_code(made(1.5, START)) != base
        assert fingerprint.of_code(made(1.0, START + 1)) != base
        monkeypatch.setattr(sys.modules[__name__], "SCALE", 3.0)
        assert fingerprint.of_code(made(1.0, START)) != base

    def test_methods_and_modules_count(self, monkeypatch):
        base = fingerprint.of_code(Doubling())
        monkeypatch.setattr(Doubling, "__call__", lambda self, x: 3 * x)
        assert fingerprint.of_code(Doubling()) != base
        module = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1))
        base = fingerprint.of_code(module)
        module[1].p = 0.2
        assert fingerprint.of_code(module) != base
        assert fingerprint.of_code(module.eval()) != fingerprint.of_code(module.train())

    test_methods_and_modules_count = pytest.mark.uses_global_generator(
        test_methods_and_modules_count
    )

    @pytest.mark.parametrize(
        "other",
        [DATA.double(), DATA.reshape(10, 6), DATA.flip(0), (DATA,) * 2, DATA[:19]],
    )
    def test_other_data_have_another_one(self, other):
        assert fingerprint.of_data(other) != fingerprint.of_data(DATA)
        assert fingerprint.of_data(DATA.clone()) == fingerprint.of_data(DATA)

    @pytest.mark.parametrize(
        "made",
        [
            lambda v: range(v),
            lambda v: (torch.float32, torch.float64)[v - 1],
            lambda v: np.float32(v),
            lambda v: slice(1, v),
            lambda v: re.compile(str(v)),
            lambda v: deque([v]),
            lambda v: itemgetter(v),
            lambda v: {"a": v}.get,
            lambda v: MappingProxyType({"a": v}),
            lambda v: bytearray([v]),
            lambda v: Decimal(v),
            lambda v: np.random.default_rng(v),
            lambda v: Path(str(v)),
            lambda v: np.array([v, "x"], dtype=object),
            lambda v: {v, 7},
            lambda v: [((1, 2), 3), ((1, 2, 3),)][v - 1],
            lambda v: [[(1, 23)], [(12, 3)]][v - 1],
        ],
    )
    def test_values_that_differ_are_told_apart(self, made):
        assert fingerprint.of_code(made(1)) == fingerprint.of_code(made(1))
        assert fingerprint.of_code(made(1)) != fingerprint.of_code(made(2))

    def test_a_cache_is_left_out(self):
        assert fingerprint.of_code(Notes([1])) == fingerprint.of_code(Notes([2]))

    def test_what_cannot_be_looked_into_agrees_with_nothing(self):
        lock = threading.Lock()
        assert fingerprint.of_code(lock) != fingerprint.of_code(lock)

    def test_classes_functions_and_hooks_count_by_what_they_hold(self, monkeypatch):
        def plain(x):
            return x

        base = fingerprint.of_code(plain)
        plain.rate = 2
        assert fingerprint.of_code(plain) != base
        base = fingerprint.of_code(Doubling())
        monkeypatch.setattr(Doubling, "table", [1, 2], raising=False)
        assert fingerprint.of_code(Doubling()) != base
        module = nn.Linear(2, 2)
        base = fingerprint.of_code(module)
        module.register_forward_hook(lambda m, a, out: 2 * out)
        assert fingerprint.of_code(module) != base

    test_classes_functions_and_hooks_count_by_what_they_hold = pytest.mark.uses_global_generator(
        test_classes_functions_and_hooks_count_by_what_they_hold
    )

    def test_the_parameters_of_a_teacher_count_and_those_of_the_trained_module_do_not(self):
        def made(teacher, student):
            loss, _ = functional_loss(student, lambda out, y: (out - teacher(y)).sum())
            return make_train_step(loss, MECHANISM, optimizers.sgd(0.1))[1]

        teacher, student = nn.Linear(2, 2), nn.Linear(2, 2)
        base = fingerprint.of_code(made(teacher, student))
        assert fingerprint.of_code(made(teacher, nn.Linear(2, 2))) == base
        assert fingerprint.of_code(made(nn.Linear(2, 2), student)) != base

    test_the_parameters_of_a_teacher_count_and_those_of_the_trained_module_do_not = (
        pytest.mark.uses_global_generator(
            test_the_parameters_of_a_teacher_count_and_those_of_the_trained_module_do_not
        )
    )

    def test_a_data_set_is_read_in_part(self):
        class Rows:
            def __init__(self, last):
                self.last = last

            def __len__(self):
                return 5

            def __getitem__(self, i):
                return torch.tensor(float(i if i < 4 else self.last)), 1

        assert fingerprint.of_data(Rows(4)) == fingerprint.of_data(Rows(4))
        assert fingerprint.of_data(Rows(4)) != fingerprint.of_data(Rows(5))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"delta": 0.0}, "delta"),
        ({"num_steps": -1}, "num_steps"),
        ({"evaluate_every": 0}, "evaluate_every"),
        ({"target_epsilon": math.nan}, "target_epsilon"),
        (
            {"mechanism": replace(MECHANISM, noise_multiplier=schedules.Schedule([1.0]))},
            "cover num_steps",
        ),
    ],
)
def test_numbers_out_of_range_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        fitted(**options)


def test_intervals_out_of_range_are_refused(tmp_path):
    with pytest.raises(ValueError, match="every >= 1"):
        Saving(folder=tmp_path, every=0)


def test_the_log_is_valid_json_with_its_unit(tmp_path):
    fitted(saving=Saving(folder=tmp_path, unit="user"))
    lines = [json.loads(line) for line in (tmp_path / run.LOG).read_text().splitlines()]
    assert lines[0]["unit"] == "user"
    assert StepEvent(noise_multiplier=1.0, sampling_prob=0.3) == MECHANISM.event()
