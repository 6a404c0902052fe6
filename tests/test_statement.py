"""The privacy claim in words: what it says, in three forms, and what else could be claimed."""

import json
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpfunc import (
    Header,
    LogFile,
    Statement,
    StepEvent,
    epsilon,
    gaussian_epsilon,
    read_run,
    verify_log,
)
from dpfunc.accounting.claims import otherwise

EVENT = StepEvent(noise_multiplier=1.0, sampling_prob=0.01, count=1000)


class TestStatement:
    def test_it_says_what_it_rests_on(self):
        said = str(Statement(log=(EVENT,), delta=1e-5, released="the weights"))
        for words in (
            "(1.829, 1e-05)",
            "add or remove one example",
            "the weights",
            "Poisson",
            "pld, an upper bound",
        ):
            assert words in said

    def test_it_refuses_a_bad_delta_and_an_event_it_cannot_account(self):
        with pytest.raises(ValueError, match="delta"):
            Statement(log=(EVENT,), delta=0, released="")
        laplace = StepEvent(noise_multiplier=1, sampling_prob=1, mechanism="laplace")
        with pytest.raises(ValueError, match="does not guess"):
            str(Statement(log=(laplace,), delta=1e-5, accountant="rdp", released=""))

    def test_nothing_released(self):
        assert "(0, 1e-05)" in str(Statement(log=(), delta=1e-5, released="nothing"))

    def test_the_accountant_is_named_with_what_its_number_is(self):
        said = {
            name: str(Statement(log=(EVENT,), delta=1e-5, accountant=name, released=""))
            for name in ("rdp", "gdp")
        }
        assert "(2.102, 1e-05)" in said["rdp"]
        assert "rdp, an upper bound" in said["rdp"]
        assert "gdp, an approximation, can under-report" in said["gdp"]

    def test_all_forms_say_the_same(self):
        statement = Statement(
            log=(EVENT,),
            delta=1e-5,
            unit="user | account",
            released="the weights,\nall of them",
            caveats=("tuning is not accounted.",),
            num_attempts=3,
            head="ab" * 32,
        )
        prose = " ".join(str(statement).split())
        table = statement.to_markdown()
        for words in (
            "(1.829, 1e-05)-differential privacy",
            "the weights, all of them",
            "tuning is not accounted.",
            "3, all of them counted whole",
            "ab" * 32,
        ):
            assert words in prose
            assert words in table
        rows = [line for line in table.splitlines() if line.startswith("|")]
        assert all(row.replace("\\|", "").count("|") == 3 for row in rows)
        whole = json.loads(statement.to_json())
        assert whole["epsilon"] == statement.epsilon
        assert whole["log"][0]["count"] == 1000
        assert (whole["num_attempts"], whole["head"]) == (3, "ab" * 32)
        assert [c["epsilon"] for c in whole["otherwise"]] == [
            c.epsilon for c in statement.otherwise
        ]
        assert "{unit}" not in prose + table + statement.to_json()

    def test_infinity_is_valid_json(self):
        bare = Statement(log=(replace(EVENT, noise_multiplier=0.0),), delta=1e-5, released="")
        whole = json.loads(bare.to_json(), parse_constant=lambda name: pytest.fail(name))
        assert whole["epsilon"] == whole["otherwise"][0]["epsilon"] == "inf"

    def test_one_of_a_file_has_its_unit_attempts_and_head(self, tmp_path):
        step = replace(EVENT, count=10)
        with LogFile(tmp_path / "log", header=Header.of((step,), unit="patient")) as file:
            file.intend((step,), attempt=0, start=0)
            file.intend((step,), attempt=5, start=3)
            opened = str(Statement.of(read_run(tmp_path / "log"), delta=1e-5, released=""))
            file.close()
        statement = Statement.of(read_run(tmp_path / "log"), delta=1e-5, released="")
        assert verify_log(tmp_path / "log", head=statement.head)
        assert statement.num_attempts == 2
        assert "remove one patient" in str(statement)
        assert statement.epsilon == epsilon((replace(EVENT, count=20),), delta=1e-5)
        assert "the log file is open" in opened
        assert "Not covered" not in str(statement)

    def test_one_of_an_old_file_says_that_nothing_shows_it_whole(self, tmp_path):
        (tmp_path / "old").write_text('{"dpfunc_log": 1}\n')
        statement = Statement.of(read_run(tmp_path / "old"), delta=1e-5, released="")
        assert "format 1" in str(statement)


class TestOtherwise:
    def test_a_fixed_size_is_the_log_with_that_sampling(self):
        fixed = replace(EVENT, sampling="fixed_without_replacement")
        claim = otherwise((EVENT,), delta=1e-5)[0]
        assert claim.epsilon == epsilon((fixed,), delta=1e-5)
        assert claim.relation == "add_or_remove_one"
        cut = replace(EVENT, sampling="truncated_poisson", overflow_prob=1e-9)
        assert otherwise((cut,), delta=1e-5)[0] == claim

    @given(st.integers(1, 200), st.integers(1, 5000), st.integers(1, 4), st.floats(1, 20))
    def test_a_shuffled_order_is_one_full_batch_an_epoch_with_the_least_noise(
        self, epoch, steps, attempts, noise
    ):
        run = StepEvent(noise_multiplier=noise, sampling_prob=1 / (epoch + 0.5), count=steps)
        log = (replace(run, noise_multiplier=2 * noise), run)
        claims = otherwise(log, delta=1e-5, num_attempts=attempts)
        (claim,) = (c for c in claims if "shuffled" in c.assumes)
        epochs = math.ceil(2 * steps / epoch) + attempts - 1
        assert claim.relation == "zero_out"
        assert claim.epsilon == pytest.approx(
            float(gaussian_epsilon(math.sqrt(epochs) / noise, 1e-5)), rel=1e-9
        )

    @given(st.lists(st.integers(1, 50), min_size=1, max_size=5), st.integers(1, 20))
    def test_attempts_never_begin_more_epochs_than_are_counted(self, steps, epoch):
        begun = sum(math.ceil(n / epoch) for n in steps)
        assert begun <= math.ceil(sum(steps) / epoch) + len(steps) - 1

    @pytest.mark.parametrize(
        ("log", "kept"),
        [
            ((), 0),
            ((replace(EVENT, sampling="none", sampling_prob=1.0),), 0),
            ((replace(EVENT, sampling_prob=0.0),), 1),
            ((EVENT, replace(EVENT, sampling_prob=0.02)), 1),  # no epoch is known
            ((replace(EVENT, sampling="fixed_without_replacement"),), 1),
            ((EVENT, replace(EVENT, mechanism="laplace", noise_multiplier=9.0)), 0),
            (tuple(replace(EVENT, noise_multiplier=1 + i) for i in range(65)), 1),
        ],
    )
    def test_what_has_no_bound_is_left_out(self, log, kept):
        assert len(otherwise(log, delta=1e-5)) == kept

    def test_an_accountant_claims_what_it_has_a_bound_for_and_a_log_it_refuses_is_refused(self):
        assert otherwise((EVENT,), delta=1e-5, accountant="rdp") == ()
        with pytest.raises(ValueError, match="does not guess"):
            otherwise((replace(EVENT, mechanism="laplace"),), delta=1e-5, accountant="rdp")
