"""Events and their log: a persistent log behaves as the tuple of its merged runs, whoever shares them."""

import copy
import math
import pickle
import sys
import threading
import time
from dataclasses import fields, replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from dpfunc import Log, StepEvent, append, epsilon
from dpfunc.events import Columns, Kind, _Store, combined_noise_multiplier


def run(noise_multiplier=1.0, sampling_prob=0.01, count=1000, **others):
    return StepEvent(
        noise_multiplier=noise_multiplier, sampling_prob=sampling_prob, count=count, **others
    )


def merged(events):
    """What a log of these events is to be, by the definition."""
    runs = []
    for event in events:
        if event.count and runs and replace(event, count=runs[-1].count) == runs[-1]:
            runs[-1] = replace(event, count=event.count + runs[-1].count)
        elif event.count:
            runs.append(event)
    return tuple(runs)


# Few values, so that neighbours are often equal and two logs often go on alike.
events = st.builds(
    run,
    noise_multiplier=st.sampled_from([0.0, 1.0, 2.0, math.inf]),
    sampling_prob=st.sampled_from([0.5, 1.0]),
    count=st.sampled_from([0, 1, 2, 2**53 + 1]),
    relation=st.sampled_from(["add_or_remove_one", "zero_out"]),
    sampling=st.just("truncated_poisson"),
    overflow_prob=st.sampled_from([0.0, 0.25]),
)
lists = st.lists(events, max_size=6)
logs = lists.map(Log)


def assert_is(log, runs):
    """The log says the same as the tuple of its runs, in every way of asking."""
    runs = tuple(runs)
    assert tuple(log) == runs
    assert [log[i] for i in range(-len(runs), len(runs))] == [*runs, *runs]
    assert log == runs
    assert runs == log
    assert len(log) == len(runs)
    assert hash(log) == hash(runs)
    assert log.closed == max(0, len(runs) - 1)
    assert_columns_are(log.columns(), log.kinds, runs)


def assert_columns_are(columns, kinds, runs):
    noise, prob, count, kind = columns
    assert [column.dtype for column in columns] == [float, float, float, np.int64]
    assert noise.tolist() == [event.noise_multiplier for event in runs]
    assert prob.tolist() == [event.sampling_prob for event in runs]
    for rounded, event in zip(count.tolist(), runs, strict=True):
        assert math.nextafter(rounded, 0) < event.count <= rounded
    assert [kinds[i] for i in kind] == [kind_of(event) for event in runs]


def kind_of(event):
    return Kind(*(getattr(event, name) for name in Kind._fields))


def steps_by_kind(value, new):
    """An exact fold: whole numbers of steps below 2**53, by noise multiplier and kind."""
    total = dict(value or {})
    for noise, count, kind in zip(new.noise_multiplier, new.count, new.kind, strict=True):
        total[noise, int(kind)] = total.get((noise, int(kind)), 0) + int(count)
    return total


class SharedPrefixes(RuleBasedStateMachine):
    """Any interleaving of what can be done to logs, beside the same done to tuples."""

    def __init__(self):
        super().__init__()
        self.made = [(Log(), ())]

    def pick(self, data):
        # The latest are likelier, so that logs get long.
        back = min(data.draw(st.integers(1, 4)), len(self.made))
        anywhere = st.integers(0, len(self.made) - 1)
        return self.made[data.draw(st.just(len(self.made) - back) | anywhere)]

    def keep(self, log, runs):
        assert type(log) is Log
        self.made.append((log, merged(runs)))

    @rule(data=st.data(), event=events)
    def append_one(self, data, event):
        log, runs = self.pick(data)
        self.keep(append(log, event), (*runs, event))

    @rule(data=st.data(), more=lists, kind=st.sampled_from([list, tuple, Log]))
    def add_on_the_right(self, data, more, kind):
        log, runs = self.pick(data)
        self.keep(log + kind(more), (*runs, *more))

    @rule(data=st.data(), more=lists, kind=st.sampled_from([list, tuple, Log]))
    def add_on_the_left(self, data, more, kind):
        log, runs = self.pick(data)
        self.keep(kind(more) + log, (*more, *runs))

    @rule(data=st.data())
    def add_two(self, data):
        (a, a_runs), (b, b_runs) = self.pick(data), self.pick(data)
        if len(a_runs) + len(b_runs) < 40:
            self.keep(a + b, a_runs + b_runs)

    @rule(data=st.data())
    def cut(self, data):
        log, runs = self.pick(data)
        part = data.draw(st.slices(len(runs)))
        self.keep(log[part], runs[part])

    @rule(data=st.data())
    def shorten(self, data):
        log, runs = self.pick(data)
        stop = data.draw(st.integers(0, len(runs)))
        self.keep(log[:stop], runs[:stop])

    @rule(data=st.data(), via=st.sampled_from([copy.copy, copy.deepcopy, Log, list]))
    def copy(self, data, via):
        log, runs = self.pick(data)
        self.keep(Log(via(log)), runs)

    @rule(data=st.data())
    def fold(self, data):
        log, _ = self.pick(data)
        closed = Columns(*(column[: log.closed] for column in log.columns()))
        assert log.folded("steps", steps_by_kind) == steps_by_kind(None, closed)

    @rule(data=st.data())
    def later_columns(self, data):
        log, runs = self.pick(data)
        start = data.draw(st.integers(0, len(runs) + 2))
        assert_columns_are(log.columns(start), log.kinds, runs[start:])

    @rule(data=st.data())
    def kinds(self, data):
        log, runs = self.pick(data)
        assert log.kinds == tuple(dict.fromkeys(map(kind_of, runs)))

    @rule(data=st.data())
    def compare(self, data):
        (a, a_runs), (b, b_runs) = self.pick(data), self.pick(data)
        assert (a == b) == (a_runs == b_runs)

    @invariant()
    def no_log_has_changed(self):
        for log, runs in self.made:
            assert len(log) == len(runs)
            assert all(a is b or a == b for a, b in zip(log, runs, strict=True))

    def teardown(self):
        for log, runs in self.made:
            assert_is(log, runs)


TestSharedPrefixes = SharedPrefixes.TestCase


class TestLog:
    @given(lists)
    def test_a_log_is_the_tuple_of_its_merged_runs(self, made):
        assert_is(Log(made), merged(made))
        assert repr(Log(made)) == f"Log({list(merged(made))!r})"

    @given(logs, events)
    def test_two_continuations_of_one_log_do_not_see_each_other(self, log, event):
        before = tuple(log)
        a = append(append(log, event), run(3.0))
        b = append(append(log, event), run(4.0))
        c = append(append(log, event), run(3.0))
        assert a == c == merged((*before, event, run(3.0)))
        assert b == merged((*before, event, run(4.0)))
        assert_is(log, before)

    def test_a_count_that_merges_later_is_not_seen_by_the_shorter_log(self):
        one = append((), run(count=1))
        two = append(one, run(count=1))
        after_one, after_two = append(one, run(2.0, count=1)), append(two, run(2.0, count=1))
        assert after_one == (run(count=1), run(2.0, count=1))
        assert after_two == (run(count=2), run(2.0, count=1))

    @given(logs)
    def test_pickle_and_copy_give_an_equal_log(self, log):
        for again in (pickle.loads(pickle.dumps(log)), copy.copy(log), copy.deepcopy(log)):
            assert type(again) is Log
            assert again == log
            assert append(again, run(7.0)) == append(log, run(7.0))

    def test_a_log_of_a_log_is_itself(self):
        log = Log([run(), run(2.0)])
        assert Log(log) is log

    def test_a_log_cannot_be_changed(self):
        log = Log([run()])
        for change in (
            lambda: log.__setitem__(0, run()),
            lambda: log.append(run()),
            lambda: setattr(log, "note", 1),
            lambda: setattr(log, "closed", 1),
        ):
            with pytest.raises(AttributeError):
                change()
        with pytest.raises(TypeError, match="does not support item assignment"):
            log[0] = run()

    def test_a_list_is_not_equal_as_it_is_not_to_a_tuple(self):
        assert Log([run()]) != [run()]
        assert Log() != []

    def test_an_index_beyond_the_end_is_refused(self):
        for index in (1, -2):
            with pytest.raises(IndexError):
                Log([run()])[index]

    @pytest.mark.parametrize(("start", "kind"), [(-1, ValueError), (0.5, TypeError)])
    def test_a_start_that_is_not_a_place_is_refused(self, start, kind):
        with pytest.raises(kind, match="start"):
            Log([run()]).columns(start)

    def test_columns_are_the_callers_to_change(self):
        log = Log([run(), run(2.0), run(3.0)])
        log.columns().noise_multiplier[:] = 9.0
        assert log.columns().noise_multiplier.tolist() == [1.0, 2.0, 3.0]

    @pytest.mark.parametrize("count", [2**53 - 1, 2**53 + 1, 2**70 + 1, 10**300, 3 * 10**299 + 7])
    def test_a_count_is_rounded_up_to_a_float(self, count):
        (rounded,) = Log([run(count=count)]).columns().count
        assert math.nextafter(rounded, 0) < count <= rounded

    def test_a_kind_is_every_field_that_is_not_a_column(self):
        assert {f.name for f in fields(StepEvent)} == {*Kind._fields, *Columns._fields} - {"kind"}

    def test_counts_that_merge_beyond_the_limit_are_refused(self):
        with pytest.raises(ValueError, match="count <= 1e300"):
            Log([run(count=10**300), run(count=1)])

    def test_every_slice_is_the_log_of_that_slice(self):
        runs = [run(1.0 + i % 2, count=i + 1) for i in range(5)]
        log, ends = Log(runs), [None, *range(-6, 7)]
        for part in (slice(a, b, c) for a in ends for b in ends for c in (None, 1, 2, 3, -1, -2)):
            assert log[part] == merged(runs[part])

    def test_threads_that_append_to_one_log_do_not_see_each_other(self, monkeypatch):
        add = _Store._add

        def add_late(store, event):
            time.sleep(1e-4)  # another thread's turn, between seeing a free place and taking it
            add(store, event)

        monkeypatch.setattr(_Store, "_add", add_late)
        bases = [Log([run(count=1)]) for _ in range(20)]
        made, together = {}, threading.Barrier(4, timeout=30)

        def work(me):
            for place, base in enumerate(bases):
                together.wait()
                log = base
                for step in range(10):
                    # Two of the four go on alike; all ask while the others write.
                    log = append(log, run(2.0 + step + max(me, 1) * 100, count=1))
                    log.columns()
                made[me, place] = log

        threads = [threading.Thread(target=work, args=(me,)) for me in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(made) == 4 * len(bases)
        for (me, _), log in made.items():
            runs = [run(2.0 + step + max(me, 1) * 100, count=1) for step in range(10)]
            assert_is(log, [run(count=1), *runs])


class TestFolded:
    def test_each_run_of_a_growing_log_is_folded_once(self):
        seen = []

        def fold(value, new):
            seen.extend(new.noise_multiplier.tolist())
            return (value or 0) + len(new.count)

        log = Log()
        for step in range(50):
            log = append(append(log, run(1.0 + step, count=1)), run(1.0 + step, count=1))
            if step % 3 == 0:
                assert log.folded("runs", fold) == step
                assert log.folded("runs", fold) == step
        assert seen == [1.0 + step for step in range(48)]

    def test_a_shorter_log_folds_for_itself_and_the_longer_keeps_its_value(self):
        calls = []

        def fold(value, new):
            calls.append(len(new.count))
            return (value or 0.0) + new.count.sum()

        long = Log([run(1.0 + i, count=i + 1) for i in range(10)])
        assert long.folded("steps", fold) == 45
        assert long[:4].folded("steps", fold) == 6
        assert long[:1].folded("steps", fold) == 0
        assert append(long, run(99.0)).folded("steps", fold) == 55
        assert calls == [9, 3, 0, 1]

    def test_names_are_apart_and_nothing_closed_folds_no_runs(self):
        for log in (Log(), Log([run()])):
            assert log.folded("a", lambda value, new: (value, len(new.count))) == (None, 0)
        log = Log([run(count=1), run(2.0)])
        assert log.folded(("power", 1), lambda value, new: (value or 0) + new.count.sum()) == 1
        assert log.folded(("power", 2), lambda value, new: (value or 0) + 2 * new.count.sum()) == 2

    def test_a_fold_that_fails_is_tried_again(self):
        log = Log([run(), run(2.0)])

        def refuse(value, new):
            raise ValueError("unknown kind")

        with pytest.raises(ValueError, match="unknown kind"):
            log.folded("a", refuse)
        assert log.folded("a", lambda value, new: (value, len(new.count))) == (None, 1)


class TestCombined:
    multipliers = st.floats(1e-300, 1e300)

    @given(st.lists(multipliers, min_size=1, max_size=5))
    def test_it_is_the_law_rounded_down(self, several):
        value = combined_noise_multiplier(*several)
        exact = sum(1 / Fraction(m) ** 2 for m in several)
        assert Fraction(value) ** 2 * exact <= 1
        assert (Fraction(value) * (1 + Fraction(1, 2**50))) ** 2 * exact > 1

    @given(st.lists(st.floats(0, math.inf), min_size=1, max_size=5), st.randoms())
    def test_it_is_below_each_and_order_does_not_matter(self, several, random):
        value = combined_noise_multiplier(*several)
        assert 0 <= value <= min(several)
        shuffled = random.sample(several, len(several))
        assert combined_noise_multiplier(*shuffled) == value
        assert combined_noise_multiplier(*several, math.inf) == value
        assert combined_noise_multiplier(*several, 0.0) == 0.0

    @given(st.floats(0, math.inf))
    def test_one_alone_is_returned_as_it_is(self, m):
        assert combined_noise_multiplier(m) == m

    def test_at_the_ends_of_float64(self):
        assert combined_noise_multiplier(5e-324, 5e-324) == 0.0
        top = sys.float_info.max
        assert combined_noise_multiplier(top, top) == pytest.approx(top / math.sqrt(2))
        assert combined_noise_multiplier(math.inf, math.inf) == math.inf

    def test_an_event_for_each_would_under_report(self):
        m = 2 * math.sqrt(2)  # of eight queries that are one of multiplier 1
        together = run(combined_noise_multiplier(*[m] * 8))
        apart = run(m, count=8 * together.count)
        spent, claimed = (epsilon((e,), delta=1e-5, accountant="rdp") for e in (together, apart))
        assert spent > 1.5 * claimed

    @pytest.mark.parametrize("bad", [-1.0, math.nan])
    def test_bad_multipliers_are_refused_by_name(self, bad):
        with pytest.raises(ValueError, match="noise_multiplier"):
            combined_noise_multiplier(1.0, bad)
        with pytest.raises(TypeError, match="at least one noise_multiplier"):
            combined_noise_multiplier()


class TestEvents:
    def test_equal_neighbours_merge_and_others_do_not(self):
        a, b = run(count=1), run(2.0, count=1)
        log = append(append(append((), a), a), b)
        assert log == (replace(a, count=2), b)
        assert log + (b, a) == Log([a, a, b, b, a])
        assert (a,) + log == Log([a, a, a, b])
        assert Log() == ()

    @given(logs, logs, events)
    def test_append_is_associative_with_addition(self, a, b, e):
        assert append(a + b, e) == a + append(b, e)
        assert hash(append(a, e)) == hash(append(Log(list(a)), e))

    def test_a_log_holds_events_alone(self):
        with pytest.raises(TypeError, match="StepEvents, got 3"):
            append((), 3)  # pyright: ignore[reportArgumentType]

    @pytest.mark.parametrize(
        ("field", "bad", "kind"),
        [
            *[("noise_multiplier", bad, ValueError) for bad in (-1, math.nan, -math.inf)],
            *[("sampling_prob", bad, ValueError) for bad in (-0.1, 1.1, math.nan, math.inf)],
            *[("count", bad, TypeError) for bad in (1.5, math.nan, math.inf, True, "1")],
            ("count", -1, ValueError),
            ("noise_multiplier", None, TypeError),
            ("noise_multiplier", True, TypeError),
            ("mechanism", "gauss", ValueError),
            ("sampling", "shuffle", ValueError),
            ("relation", "add", ValueError),
            *[("overflow_prob", bad, ValueError) for bad in (-0.1, 1.1, math.nan, 0.5)],
        ],
    )
    def test_bad_fields_are_refused_by_name(self, field, bad, kind):
        with pytest.raises(kind, match=field):
            run(**{field: bad})

    def test_no_sampling_means_probability_one(self):
        with pytest.raises(ValueError, match="sampling_prob=1 with sampling='none'"):
            run(sampling="none")

    @pytest.mark.parametrize("sampling", ["poisson", "fixed_without_replacement", "none"])
    def test_only_a_cut_draw_may_overflow(self, sampling):
        with pytest.raises(ValueError, match=f"overflow_prob=0 with sampling='{sampling}'"):
            run(sampling_prob=1.0, sampling=sampling, overflow_prob=1e-9)
        for bound in (0.0, 1e-9, 1.0):
            event = run(sampling="truncated_poisson", overflow_prob=bound)
            assert event.overflow_prob == bound

    def test_zero_has_no_sign(self):
        event = run(-0.0, -0.0, sampling="truncated_poisson", overflow_prob=-0.0)
        for zero in (event.noise_multiplier, event.sampling_prob, event.overflow_prob):
            assert str(zero) == "0.0"

    def test_numbers_of_numpy_become_plain(self):
        event = run(np.float32(0.5), np.float64(0.25), np.int64(3))
        assert [type(v) for v in (event.noise_multiplier, event.sampling_prob, event.count)] == [
            float,
            float,
            int,
        ]


@pytest.mark.parametrize("sampling", ["shuffle", "DataLoader", "sequential"])
def test_a_loader_is_refused_with_what_can_be_claimed_instead(sampling):
    with pytest.raises(ValueError, match=r"not drawn independently.*an epoch is one event"):
        StepEvent(noise_multiplier=1.0, sampling_prob=0.01, sampling=sampling)
    epochs = StepEvent(
        noise_multiplier=4.0, sampling_prob=1.0, sampling="none", relation="zero_out", count=10
    )
    assert 0 < epsilon((epochs,), delta=1e-5) < math.inf
