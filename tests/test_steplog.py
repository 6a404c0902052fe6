"""The log on disk: what is written is read, a kill loses no step, and an edit is found."""

import errno
import json
import math
import os
import random
import re
import signal
import stat
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, fields, replace
from hashlib import sha256
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from dpfunc import Header, Log, LogFile, StepEvent, read_log, read_run, verify_log, write_log
from dpfunc.accounting.steplog import disk

EVENT = StepEvent(noise_multiplier=1.0, sampling_prob=0.01, count=1000)
STEP = replace(EVENT, count=1)
QUIET = replace(STEP, noise_multiplier=2.0)

events = st.builds(
    StepEvent,
    noise_multiplier=st.sampled_from([0.0, 0.1, 1.0, 1 / 3, 1e300, math.inf]),
    sampling_prob=st.sampled_from([0.01, 1 / 3, 1.0]),
    count=st.sampled_from([0, 1, 3, 2**53 + 1, 10**300]),
    mechanism=st.sampled_from(["gaussian", "laplace"]),
    relation=st.sampled_from(["add_or_remove_one", "replace_one"]),
) | st.builds(
    replace,
    st.just(replace(STEP, sampling="truncated_poisson")),
    overflow_prob=st.sampled_from([0.0, 1e-12]),
)
in_a_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def steps_of(log):
    return sum(event.count for event in log)


class TestWhole:
    @in_a_folder
    @given(st.lists(events, max_size=5), st.text(), st.text())
    def test_what_is_written_is_read(self, tmp_path, some, unit, note):
        if steps_of(some) > 10**300:
            some = some[:1]
        log = Log(some)
        write_log(tmp_path / "log", log, unit=unit, note=note)
        run = read_run(tmp_path / "log")
        assert read_log(tmp_path / "log") == run.log == log
        assert (run.header.unit, run.header.note, run.closed) == (unit, note, True)
        assert verify_log(tmp_path / "log")
        assert verify_log(tmp_path / "log", head=run.head)
        for line in (tmp_path / "log").read_text().splitlines():
            json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))

    def test_the_format_is_the_documented_one(self, tmp_path):
        log = Log([EVENT, replace(EVENT, noise_multiplier=math.inf)])
        write_log(tmp_path / "log", log, unit="user", note="first try")
        lines = (tmp_path / "log").read_bytes().splitlines()
        head = ""
        for line in lines:
            text, _, end = line.rpartition(b', "sha256": "')
            head = sha256(head.encode() + text).hexdigest()
            assert end == head.encode() + b'"}'
        header, steps, closed = ({**json.loads(line), "sha256": ""} for line in lines)
        assert header == {
            "dpfunc_log": 2,
            "relation": "add_or_remove_one",
            "mechanism": "gaussian",
            "sampling": "poisson",
            "unit": "user",
            "note": "first try",
            "sha256": "",
        }
        first = {"noise_multiplier": 1.0, "sampling_prob": 0.01, "count": 1000}
        runs = [first, {**first, "noise_multiplier": "inf"}]
        assert steps == {"attempt": 0, "start": 0, "events": runs, "sha256": ""}
        assert closed == {"closed": True, "sha256": ""}
        assert read_run(tmp_path / "log").head == head

    def test_one_file_readable_by_all_is_left(self, tmp_path):
        write_log(tmp_path / "log", (EVENT,))
        with LogFile(tmp_path / "other"):
            pass
        assert sorted(p.name for p in tmp_path.iterdir()) == ["log", "other"]
        for path in tmp_path.iterdir():
            assert stat.S_IMODE(path.stat().st_mode) == 0o644

    def test_fields_that_differ_are_in_every_event_and_later_ones_where_they_say_something(
        self, tmp_path
    ):
        cut = replace(EVENT, sampling="truncated_poisson", overflow_prob=1e-12)
        log = Log([cut, replace(cut, overflow_prob=0.0), EVENT])
        write_log(tmp_path / "log", log)
        assert read_log(tmp_path / "log") == log
        header, steps, _ = lines_of(tmp_path / "log")
        assert "sampling" not in header
        assert [e["sampling"] for e in steps["events"]] == [cut.sampling, cut.sampling, "poisson"]
        assert [e.get("overflow_prob") for e in steps["events"]] == [1e-12, None, None]

    def test_a_long_log_takes_several_lines(self, tmp_path):
        log = Log(replace(EVENT, noise_multiplier=1 + i) for i in range(25_000))
        write_log(tmp_path / "log", log)
        assert [line.get("start") for line in lines_of(tmp_path / "log")] == [
            None,
            0,
            10_000_000,
            20_000_000,
            None,
        ]
        assert read_log(tmp_path / "log") == log

    def test_an_unwritable_place_leaves_nothing(self, tmp_path):
        for write in (lambda path: write_log(path, (EVENT,)), LogFile):
            with pytest.raises(OSError, match="Expected a folder"):
                write(tmp_path / "nowhere" / "log")
        assert list(tmp_path.iterdir()) == []


class TestFirstFormat:
    HEADER = '{"dpfunc_log": 1}\n'
    LINE = (
        '{"noise_multiplier": "inf", "sampling_prob": 1.0, "count": 7, "mechanism": "gaussian", '
        '"sampling": "none", "relation": "add_or_remove_one"}\n'
    )

    def test_it_is_read(self, tmp_path):
        spelled_out = json.dumps(asdict(EVENT)) + "\n"
        assert "overflow_prob" in spelled_out
        (tmp_path / "old").write_text(self.HEADER + spelled_out + self.LINE)
        silent = replace(EVENT, noise_multiplier=math.inf, sampling_prob=1.0, sampling="none")
        assert read_log(tmp_path / "old") == (EVENT, replace(silent, count=7))
        run = read_run(tmp_path / "old")
        assert (run.head, run.closed, run.attempts[0].stop) == ("", False, 1007)

    def test_nothing_can_be_shown_of_it_and_nothing_is_added(self, tmp_path):
        (tmp_path / "old").write_text(self.HEADER + self.LINE)
        assert "no hashes" in str(verify_log(tmp_path / "old"))
        assert not verify_log(tmp_path / "old")
        with pytest.raises(ValueError, match="format 1, which is not added to"):
            LogFile(tmp_path / "old")
        assert (tmp_path / "old").read_text() == self.HEADER + self.LINE

    @pytest.mark.parametrize("name", [field.name for field in fields(StepEvent)])
    def test_what_every_version_writes_is_not_guessed(self, name, tmp_path):
        entry = asdict(EVENT)
        del entry[name]
        (tmp_path / "log").write_text(f"{self.HEADER}{json.dumps(entry)}\n")
        if name == "overflow_prob":
            assert read_log(tmp_path / "log") == (EVENT,)
        else:
            with pytest.raises(ValueError, match=f"line 2: .* fields .*{name}"):
                read_log(tmp_path / "log")

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("", "line 1: .* begin with"),
            ("[3]\n", "line 1: .* begin with"),
            ('{"dpfunc_log": 3}\n', "line 1: .* format 2 or before, got 3"),
            ('{"dpfunc_log": true}\n', "line 1: .* begin with"),
            (HEADER + '{"noise_multiplier": 1}\n', "line 2: .* fields"),
            (HEADER + json.dumps({**asdict(EVENT), "shuffled": True}) + "\n", "line 2: .* fields"),
            (HEADER + json.dumps({**asdict(EVENT), "count": "3"}) + "\n", "line 2: .* count"),
            (HEADER + LINE.replace('"inf"', "NaN"), "line 2: .* JSON"),
            (HEADER + "nonsense\n", "line 2: Expected JSON"),
            (HEADER + '{"noise_multiplier"', "cut off"),
        ],
    )
    def test_a_damaged_or_newer_file_is_refused(self, text, said, tmp_path):
        (tmp_path / "log").write_text(text)
        with pytest.raises(ValueError, match=said):
            read_log(tmp_path / "log")
        assert not verify_log(tmp_path / "log")
        if text:
            with pytest.raises(ValueError, match="log"):
                LogFile(tmp_path / "log")
        assert (tmp_path / "log").read_text() == text


@pytest.fixture
def path(tmp_path):
    return tmp_path / "log"


class TestAttempts:
    def test_steps_follow_each_other_and_a_stop_takes_back_the_surplus(self, path):
        with LogFile(path) as file:
            file.intend((replace(STEP, count=100),), attempt=0, start=0)
            file.intend((replace(STEP, count=50), replace(QUIET, count=50)), attempt=0, start=100)
            assert file.run.attempts[0].stop == 200
            file.stop(160, attempt=0)
            file.intend((replace(QUIET, count=5),), attempt=0, start=160)
            file.close()
        run = read_run(path)
        assert run.log == (replace(STEP, count=150), replace(QUIET, count=15))
        assert run == file.run
        assert run.closed

    def test_a_replay_counts_once_and_another_attempt_counts_again(self, path):
        with LogFile(path) as file:
            file.intend((replace(STEP, count=10), replace(QUIET, count=10)), attempt=0, start=0)
            file.intend((replace(STEP, count=2), replace(QUIET, count=20)), attempt=0, start=8)
            file.intend((replace(STEP, count=2), QUIET), attempt=0, start=8)
            assert file.run.attempts[0].stop == 30
            file.intend((replace(STEP, count=7),), attempt=2**63 - 1, start=12)
            file.intend((replace(QUIET, count=3),), attempt=0, start=20)
        run = read_run(path)
        assert run.attempts[0].log == (replace(STEP, count=10), replace(QUIET, count=20))
        assert run.attempts[2**63 - 1] == (12, 19, (replace(STEP, count=7),))
        assert steps_of(run.log) == 37
        assert list(run.attempts) == [0, 2**63 - 1]

    def test_a_replay_that_stops_early_takes_nothing_back_of_the_run_it_replays(self, path):
        """100 steps were declared, some 57 run, then a kill; the replay from 50 is stopped at 52."""
        with LogFile(path) as file:
            file.intend((replace(STEP, count=100),), attempt=0, start=0)
            killed = path.read_bytes()
            file.intend((replace(STEP, count=20),), attempt=0, start=50)
            file.stop(52, attempt=0)
            assert file.run.attempts[0].stop == 100
        path.write_bytes(killed)
        with LogFile(path) as file:
            file.stop(52, attempt=0)
            assert file.run.attempts[0].stop == 100
            file.intend((replace(STEP, count=70),), attempt=0, start=50)
            file.stop(110, attempt=0)
            file.intend((replace(STEP, count=5),), attempt=0, start=110)
            file.stop(112, attempt=0)
        assert read_run(path).attempts[0].stop == 112

    @pytest.mark.parametrize(
        ("wrong", "said"),
        [
            (lambda f: f.intend((STEP,), attempt=0, start=11), "0 <= start <= 10 .* got 11"),
            (lambda f: f.intend((STEP,), attempt=5, start=1), "2 <= start <= 3 .* began later"),
            (lambda f: f.intend((QUIET,), attempt=0, start=9), "steps 9 to 9 of attempt 0"),
            (lambda f: f.intend((STEP,), attempt=-1, start=0), "attempt >= 0"),
            (lambda f: f.intend((STEP,), attempt=2**63, start=0), r"attempt < 2\*\*63"),
            (lambda f: f.intend((STEP,), attempt=0, start=-1), "start >= 0"),
            (
                lambda f: f.intend((replace(STEP, relation="replace_one"),), attempt=0, start=10),
                "relation='add_or_remove_one', as the header",
            ),
            (lambda f: f.stop(11, attempt=0), "0 <= stop <= 10"),
            (lambda f: f.stop(1, attempt=5), "2 <= stop <= 3"),
            (lambda f: f.stop(0, attempt=7), "an attempt that was declared, got 7"),
        ],
    )
    def test_what_does_not_follow_is_refused_and_not_written(self, wrong, said, path):
        with LogFile(path, header=Header.of((STEP,))) as file:
            file.intend((replace(STEP, count=10),), attempt=0, start=0)
            file.intend((STEP,), attempt=5, start=2)
            before = path.read_bytes(), file.run
            with pytest.raises(ValueError, match=said):
                wrong(file)
            assert (path.read_bytes(), file.run) == before

    def test_the_first_run_begins_at_its_first_step(self, path):
        with (
            LogFile(path) as file,
            pytest.raises(ValueError, match="attempt 0 to begin at start=0"),
        ):
            file.intend((STEP,), attempt=0, start=1)

    def test_a_file_that_says_what_no_writer_would_is_refused_by_line_and_steps(self, path):
        with LogFile(path) as file:
            file.intend((replace(STEP, count=10),), attempt=0, start=0)
            # Behind the writer's checks, so that the chain is right and what it says is not.
            entry = {"attempt": 0, "start": 5, "events": [asdict(QUIET)]}
            del entry["events"][0]["overflow_prob"]
            file._append(entry, {})
        with pytest.raises(ValueError, match="line 3: Expected steps 5 to 5 of attempt 0"):
            read_run(path)
        found = verify_log(path)
        assert (found.line, found.num_steps) == (3, 10)

    @pytest.mark.parametrize(
        "entry", [{"attempt": 0, "stop": 0, "why": 1}, {"closed": False}, {"opened": True}]
    )
    def test_an_unknown_line_is_refused_and_not_guessed(self, entry, path):
        with LogFile(path) as file:
            file._append(entry, {})
        with pytest.raises(ValueError, match="line 2: Expected steps, a stop or the end"):
            read_run(path)

    def test_no_steps_write_nothing(self, path):
        with LogFile(path) as file:
            file.intend((), attempt=0, start=0)
            file.intend((replace(STEP, count=0),), attempt=0, start=0)
        assert len(lines_of(path)) == 1


class WriteAhead(RuleBasedStateMachine):
    """Any order of intents, stops, replays and reopenings, beside a dictionary of steps."""

    def __init__(self):
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name) / "log"
        self.file = LogFile(self.path)
        self.attempts = {}
        self.kept = {}

    def teardown(self):
        self.file.__exit__(None, None, None)
        self.folder.cleanup()

    @rule(
        attempt=st.sampled_from([0, 7, 2**62]),
        start=st.integers(0, 12),
        steps=st.lists(st.sampled_from([STEP, QUIET]), min_size=1, max_size=5),
    )
    def intend(self, attempt, start, steps):
        first, known = self.attempts.get(attempt, (start, []))
        follows = first <= start <= first + len(known) and (attempt or first == 0)
        again = known[start - first :][: len(steps)]
        if follows and again == steps[: len(again)]:
            self.file.intend(tuple(steps), attempt=attempt, start=start)
            if again:
                self.kept[attempt] = first + len(known)
            self.attempts[attempt] = (first, known + steps[len(again) :])
        else:
            with pytest.raises(ValueError, match=r"start|steps"):
                self.file.intend(tuple(steps), attempt=attempt, start=start)

    @precondition(lambda self: self.attempts)
    @rule(data=st.data())
    def stop(self, data):
        attempt = data.draw(st.sampled_from(list(self.attempts)))
        first, known = self.attempts[attempt]
        kept = data.draw(st.integers(0, len(known)))
        self.file.stop(first + kept, attempt=attempt)
        kept = max(kept, self.kept.get(attempt, first) - first)
        self.attempts[attempt] = (first, known[:kept])

    @rule(
        complete=st.booleans(), torn=st.sampled_from([b"", b"{", b'{"attempt": 0, "sta', b"\x00"])
    )
    def reopen(self, complete, torn):
        head = self.file.head
        if complete:
            self.file.close()
            assert verify_log(self.path)
        else:
            self.file.__exit__(None, None, None)
        with open(self.path, "ab") as file:
            file.write(torn)
        self.file = LogFile(self.path, extends=head)
        self.kept = {number: first + len(known) for number, (first, known) in self.attempts.items()}

    @invariant()
    def it_is_the_model(self):
        run = read_run(self.path)
        assert run == self.file.run
        assert list(run.attempts) == list(self.attempts)
        for number, (first, steps) in self.attempts.items():
            assert run.attempts[number] == (first, first + len(steps), Log(steps))
        assert verify_log(self.path, head=self.file.head)


WriteAhead.TestCase.settings = settings(max_examples=25, stateful_step_count=20, deadline=None)
TestWriteAhead = WriteAhead.TestCase


def written(path, close=True):
    """A file of some lines of each kind, and the steps declared when it had so many bytes."""
    sizes = [(0, 0)]
    with LogFile(path, header=Header.of((STEP,), note="é, \u2028 and \x00")) as file:
        for attempt, start, count in ((0, 0, 4), (0, 4, 4), (9, 6, 3)):
            file.intend((replace(STEP, count=count),), attempt=attempt, start=start)
            sizes.append((path.stat().st_size, steps_of(file.run.log)))
        if close:
            file.stop(8, attempt=9)
            file.close()
    return sizes


@pytest.fixture(scope="module")
def closed(tmp_path_factory):
    path = tmp_path_factory.mktemp("closed") / "log"
    written(path)
    return path.read_bytes()


class TestVerify:
    def changed(self, path, content):
        path.write_bytes(content)
        return verify_log(path)

    def test_a_whole_file_is_whole(self, closed, path):
        found = self.changed(path, closed)
        assert found
        assert "6 lines, closed" in str(found)
        assert "10 steps in 2 attempts" in str(found)
        assert found.head in str(found)

    def test_every_changed_byte_is_found_in_its_line(self, closed, path):
        rng = random.Random(0)
        for place, old in enumerate(closed):
            for new in {rng.choice([old ^ 1, rng.randrange(256), *b"\n 0"])} - {old}:
                found = self.changed(path, closed[:place] + bytes([new]) + closed[place + 1 :])
                assert not found
                line = closed[:place].count(b"\n") + 1
                assert found.line == line or (found.line, line) == (7, 6)

    def test_every_inserted_or_removed_byte_is_found(self, closed, path):
        for place in random.Random(1).sample(range(len(closed)), 150):
            assert not self.changed(path, closed[:place] + closed[place + 1 :])
            for byte in (b" ", b"\n", closed[place : place + 1]):
                assert not self.changed(path, closed[:place] + byte + closed[place:])
        assert not self.changed(path, closed + b"\n")

    def test_lines_removed_repeated_swapped_or_put_in_front_are_found(self, closed, path):
        lines = closed.splitlines(keepends=True)
        for i in range(len(lines)):
            removed = self.changed(path, b"".join(lines[:i] + lines[i + 1 :]))
            assert removed.line == i + 1
            repeated = self.changed(path, b"".join(lines[: i + 1] + lines[i:]))
            assert repeated.line == i + 2
            for j in range(i):
                swapped = list(lines)
                swapped[i], swapped[j] = lines[j], lines[i]
                assert self.changed(path, b"".join(swapped)).line == j + 1

    @pytest.mark.parametrize("places", range(1, 6))
    def test_a_file_cut_between_lines_is_found(self, places, closed, path):
        lines = closed.splitlines(keepends=True)[:places]
        found = self.changed(path, b"".join(lines))
        assert "not closed" in found.problem
        assert found.line == places + 1
        assert verify_log(path, head=found.head)

    def test_a_file_cut_within_a_line_is_found(self, closed, path):
        ends = {i + 1 for i, byte in enumerate(closed) if byte == ord("\n")}
        for place in random.Random(2).sample(range(len(closed)), 200):
            if place in ends:
                continue
            assert not self.changed(path, closed[:place])

    def test_half_a_line_beyond_the_end_is_found(self, closed, path):
        found = self.changed(path, closed + b"{")
        assert (found.line, found.problem) == (7, "It is cut off, in the middle of its last line.")
        assert not verify_log(path, head=found.head)

    def test_the_header_of_another_log_is_found(self, closed, path, tmp_path):
        write_log(tmp_path / "other", (EVENT,), unit="user")
        header = (tmp_path / "other").read_bytes().splitlines(keepends=True)[0]
        found = self.changed(path, header + closed.partition(b"\n")[2])
        assert found.line == 2
        with pytest.raises(ValueError, match="line 2: Expected it to end in the SHA-256"):
            read_log(path)

    def test_a_log_written_anew_is_found_by_its_head(self, closed, path):
        path.write_bytes(closed)
        head = verify_log(path).head
        write_log(path, read_log(path))
        assert verify_log(path)
        assert "No line has the expected head" in verify_log(path, head=head).problem

    def test_a_log_that_went_on_is_not_the_one_a_statement_was_made_of(self, path):
        written(path)
        head = verify_log(path).head
        with LogFile(path, extends=head) as file:
            file.intend((STEP,), attempt=0, start=8)
            file.close()
        found = verify_log(path, head=head)
        assert (found.line, bool(found)) == (7, False)
        assert "lines were added since" in found.problem
        assert verify_log(path).num_steps == 11

    def test_a_file_that_is_missing_raises(self, path):
        with pytest.raises(FileNotFoundError):
            verify_log(path)


PAGE = Path(__file__).parents[1] / "docs" / "log.md"


@pytest.mark.skipif(not PAGE.exists(), reason="runs from the source tree")
class TestPage:
    def test_its_program_finds_the_head_and_an_edit(self, closed, path):
        namespace = {}
        (program,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
        exec(program, namespace)
        path.write_bytes(closed)
        assert namespace["head_of"](path) == verify_log(path).head
        path.write_bytes(closed.replace(b'"start": 4', b'"start": 3'))
        with pytest.raises(AssertionError):
            namespace["head_of"](path)

    def test_its_lines_are_those_that_are_written(self, path):
        with LogFile(path, header=Header.of((STEP,))) as file:
            file.intend((replace(STEP, count=100),), attempt=0, start=0)
            file.stop(60, attempt=0)
            file.close()
        (shown,) = re.findall(r"```json\n(.*?)```", PAGE.read_text(), re.DOTALL)
        for line, written in zip(shown.splitlines(), lines_of(path), strict=True):
            assert {**json.loads(line), "sha256": ""} == {**written, "sha256": ""}
            assert list(json.loads(line)) == list(written)


class TestKill:
    def test_a_prefix_of_any_length_counts_what_was_declared_when_it_was_written(self, path):
        sizes = written(path, close=False)
        whole = path.read_bytes()
        header = Header.of((STEP,), note="é, \u2028 and \x00")
        near = {size + by for size, _ in sizes for by in (-2, -1, 0, 1)} | {whole.index(b"\n") + 1}
        for place in {*range(0, len(whole), 7), *near} & {*range(len(whole) + 1)}:
            path.write_bytes(whole[:place])
            promised = max(steps for size, steps in sizes if size <= place)
            if place > whole.index(b"\n"):
                assert steps_of(read_log(path)) >= promised
            with LogFile(path, header=header) as file:
                assert steps_of(file.run.log) >= promised
                assert verify_log(path, head=file.head)
                assert whole.startswith(path.read_bytes())

    # The writer says on its standard output which steps it "runs", each after its intent returned.
    WRITER = """
import sys
from dpfunc.accounting import LogFile
from dpfunc.events import StepEvent
step = StepEvent(noise_multiplier=1.0, sampling_prob=0.01)
with LogFile(sys.argv[1]) as file:
    start = file.run.attempts[0].stop if file.run.attempts else 0
    while True:
        file.intend((step,) * 3, attempt=0, start=start)
        for start in range(start + 1, start + 4):
            sys.stdout.write(f"{start}\\n")
            sys.stdout.flush()
"""

    def test_a_process_killed_while_it_writes_has_counted_what_it_ran(self, path):
        rng = random.Random(5)
        ran = 0
        for _ in range(5):
            child = subprocess.Popen(
                [sys.executable, "-c", self.WRITER, str(path)], stdout=subprocess.PIPE
            )
            first = child.stdout.readline()
            time.sleep(rng.uniform(0, 0.05))
            child.send_signal(signal.SIGKILL)
            rest = child.stdout.read()
            child.stdout.close()
            assert child.wait() == -signal.SIGKILL
            *whole, _ = (first + rest).split(b"\n")
            assert int(whole[-1]) > ran
            ran = int(whole[-1])
            assert ran <= steps_of(read_log(path)) <= ran + 3
        with LogFile(path) as file:
            counted = file.run.attempts[0].stop
            file.stop(ran, attempt=0)  # who is killed may have run more than it said
            file.intend((STEP,) * 9, attempt=0, start=counted)
            file.stop(counted + 1, attempt=0)
            file.close()
        assert verify_log(path).num_steps == counted + 1


class TestWriter:
    def test_two_at_once_are_refused_and_one_after_the_other_not(self, path):
        with LogFile(path):
            with pytest.raises(BlockingIOError, match="Expected one writer"):
                LogFile(path)
            code = "import sys; from dpfunc.accounting import LogFile; LogFile(sys.argv[1])"
            other = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True)
            assert b"Expected one writer" in other.stderr
        with LogFile(path):
            pass

    def test_a_line_is_on_disk_before_intend_returns(self, path, monkeypatch):
        synced, sync = [], os.fsync

        def spy(descriptor):
            sync(descriptor)
            synced.append(path.stat().st_size)

        with LogFile(path) as file:
            monkeypatch.setattr(os, "fsync", spy)
            for act in (
                lambda: file.intend((STEP,), attempt=0, start=0),
                lambda: file.stop(0, attempt=0),
                file.close,
            ):
                act()
                assert synced[-1] == path.stat().st_size
            assert len(synced) == 3

    def test_a_new_file_is_in_its_folder_before_anything_is_declared(self, path, monkeypatch):
        synced, sync = [], os.fsync

        def spy(descriptor):
            sync(descriptor)
            synced.append(os.fstat(descriptor).st_ino)

        monkeypatch.setattr(os, "fsync", spy)
        with LogFile(path):
            assert synced[-1] == path.parent.stat().st_ino
            assert path.stat().st_ino in synced
        write_log(path.with_name("other"), ())
        assert synced[-1] == path.parent.stat().st_ino

    @pytest.mark.parametrize("failing", ["write", "fsync"])
    def test_a_full_or_failing_disk_raises_and_leaves_the_file_as_it_was(
        self, failing, path, monkeypatch
    ):
        with LogFile(path) as file:
            file.intend((STEP,), attempt=0, start=0)
            before = path.read_bytes(), file.run

            class Full:
                def __getattr__(self, name):
                    return getattr(real, name)

                def write(self, content):
                    if len(content) <= 20:
                        raise OSError(errno.ENOSPC, "No space left on device")
                    return real.write(content[:20])

            real, sync, calls = file._file, os.fsync, []

            def fails_once(descriptor):
                calls.append(descriptor)
                if len(calls) == 1:
                    raise OSError(errno.EIO, "Input/output error")
                sync(descriptor)

            with monkeypatch.context() as patch:
                if failing == "write":
                    patch.setattr(file, "_file", Full())
                else:
                    patch.setattr(os, "fsync", fails_once)
                with pytest.raises(OSError, match=r"No space|Input/output"):
                    file.intend((replace(STEP, count=9),), attempt=0, start=1)
            assert (path.read_bytes(), file.run) == before
            file.intend((STEP,), attempt=0, start=1)
        assert steps_of(read_log(path)) == 2

    def test_an_interrupt_leaves_file_and_writer_agreeing_wherever_it_comes(self, path):
        """At every line of Python that an append runs, in turn."""
        place, done = 0, False
        with LogFile(path) as file:

            def intend():
                start = file.run.attempts[0].stop if file.run.attempts else 0
                file.intend((STEP,), attempt=0, start=start)

            while not done:
                left = place = place + 1

                def trace(frame, kind, _):
                    nonlocal left
                    if frame.f_code.co_filename.endswith(("writer.py", "disk.py")):
                        left -= 1
                        if not left:
                            raise KeyboardInterrupt
                        return trace

                before = sys.gettrace()
                sys.settrace(trace)
                try:
                    intend()
                    done = True
                except KeyboardInterrupt:
                    pass
                finally:
                    sys.settrace(before)
                intend()
                assert file.run == read_run(path)
        assert place > 20

    def test_a_file_changed_by_someone_else_is_not_added_to(self, path):
        for change in (
            lambda: path.write_bytes(path.read_bytes()[:-5]),
            lambda: path.write_bytes(path.read_bytes() + b"\n"),
            path.unlink,
        ):
            with LogFile(path) as file:
                file.intend((STEP,), attempt=0, start=0)
                change()
                with pytest.raises(OSError, match="Someone else has changed it"):
                    file.intend((STEP,), attempt=0, start=1)
            path.unlink(missing_ok=True)

    def test_another_header_or_a_lost_line_is_refused(self, path):
        with LogFile(path, header=Header(unit="user")) as file:
            file.intend((STEP,), attempt=0, start=0)
            head = file.head
        with pytest.raises(ValueError, match="It is the log of another run"):
            LogFile(path, header=Header(unit="image"))
        with LogFile(path, extends=head) as file:
            assert file.run.header == Header(unit="user")
        path.write_bytes(path.read_bytes().splitlines(keepends=True)[0])
        with pytest.raises(ValueError, match="Lines were lost since"):
            LogFile(path, extends=head)
        path.unlink()
        with pytest.raises(FileNotFoundError, match="Expected a log at"):
            LogFile(path, extends=head)
        assert not path.exists()

    def test_a_file_that_is_no_log_is_left_alone(self, path):
        for content in (b"my thesis", b"my\nthesis", b"{}\n", b'{"dpfunc_log": 2, "other'):
            path.write_bytes(content)
            with pytest.raises(ValueError, match="line 1"):
                LogFile(path)
            assert path.read_bytes() == content

    def test_a_closed_file_is_closed_once_and_goes_on_when_it_is_opened(self, path):
        with LogFile(path) as file:
            file.close()
        with LogFile(path) as file:
            assert file.run.closed
            file.close()
        assert len(lines_of(path)) == 2
        with LogFile(path) as file:
            file.intend((STEP,), attempt=0, start=0)
            assert not read_run(path).closed

    def test_without_locks_it_writes_all_the_same(self, path, monkeypatch):
        monkeypatch.setattr(disk, "fcntl", None)
        with LogFile(path) as file:
            file.intend((STEP,), attempt=0, start=0)
        assert read_log(path) == (STEP,)

    @pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write")
    def test_a_folder_without_permission_raises(self, tmp_path):
        tmp_path.chmod(0o500)
        with pytest.raises(PermissionError):
            LogFile(tmp_path / "log")

    @pytest.mark.parametrize(
        ("fields", "said"),
        [
            ({"relation": "sibling"}, "relation to be one of"),
            ({"note": 3}, "note to be text"),
            ({"unit": None}, "unit to be text"),
        ],
    )
    def test_a_header_is_checked_by_name(self, fields, said):
        with pytest.raises((ValueError, TypeError), match=said):
            Header(**fields)
