"""The accounting verbs: answers that scripts can read, codes they can act on, errors of one line."""

import json
import sys

import pytest

from dpfunc import (
    Header,
    LogFile,
    Statement,
    StepEvent,
    calibrate_num_steps,
    calibrate_sampling_prob,
    cli,
    delta,
    epsilon,
    read_run,
    verify_log,
    write_log,
)

EVENT = StepEvent(noise_multiplier=1.0, sampling_prob=0.01, count=1000)
NUMBERS = "--noise-multiplier 1 --sampling-prob 0.01 --num-steps 1000"


def said(capsys, words):
    """What the words answer; they have to work."""
    assert cli.main(words.split()) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    return printed.out


def test_epsilon_of_numbers_and_of_a_log_file(capsys, tmp_path):
    numbers = "--noise-multiplier 1 --sampling-prob 0.01 --num-steps 1000 --delta 1e-5"
    assert cli.main(["epsilon", *numbers.split()]) == 0
    from_numbers = capsys.readouterr().out
    assert float(from_numbers) == pytest.approx(1.82824, abs=1e-4)
    write_log(tmp_path / "log.jsonl", (EVENT,))
    assert cli.main(["epsilon", "--log", str(tmp_path / "log.jsonl"), "--delta", "1e-5"]) == 0
    assert capsys.readouterr().out == from_numbers


def test_calibrate_prints_json_that_scripts_can_read(capsys):
    words = "calibrate --target-epsilon 3 --sampling-prob 0.01 --num-steps 1000 --delta 1e-5 --json"
    assert cli.main(words.split()) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["noise_multiplier"] == pytest.approx(0.81358, abs=1e-4)
    assert (answer["accountant"], answer["claim"]) == ("pld", "an upper bound")


def test_an_approximation_says_so(capsys):
    words = "epsilon --noise-multiplier 1 --sampling-prob 0.01 --num-steps 1000 --delta 1e-5"
    assert cli.main([*words.split(), "--accountant", "gdp"]) == 0
    assert "1.6" in (said := capsys.readouterr().out)
    assert "approximation, can under-report" in said


def test_infinity_is_valid_json(capsys):
    words = "epsilon --noise-multiplier 0 --sampling-prob 1 --num-steps 1 --delta 1e-5 --json"
    assert cli.main(words.split()) == 0
    assert json.loads(capsys.readouterr().out)["epsilon"] == "inf"


@pytest.fixture
def run_file(tmp_path):
    """The closed log of a run of two attempts."""
    path = tmp_path / "log.jsonl"
    with LogFile(path, header=Header.of((EVENT,), unit="patient")) as file:
        file.intend((EVENT,), attempt=0, start=0)
        file.intend((EVENT,), attempt=9, start=500)
        file.close()
    return path


def test_delta_is_that_of_the_library_rounded_up(capsys):
    value = delta((EVENT,), epsilon=2.0)
    shown = float(said(capsys, f"delta {NUMBERS} --epsilon 2"))
    assert value <= shown <= value * (1 + 1e-5)
    answer = json.loads(said(capsys, f"delta {NUMBERS} --epsilon 2 --json"))
    assert answer == {
        "delta": value,
        "epsilon": 2.0,
        "accountant": "pld",
        "claim": "an upper bound",
    }


def test_numbers_may_say_the_kind_of_event(capsys):
    fixed = StepEvent(
        noise_multiplier=3.0,
        sampling_prob=0.01,
        count=10,
        sampling="fixed_without_replacement",
        relation="replace_one",
    )
    words = (
        "epsilon --noise-multiplier 3 --sampling-prob 0.01 --num-steps 10 --delta 1e-5 --json "
        "--sampling fixed_without_replacement --relation replace_one"
    )
    assert json.loads(said(capsys, words))["epsilon"] == epsilon((fixed,), delta=1e-5)


def test_calibrate_finds_the_third_of_three_and_what_it_prints_fits(capsys):
    target = "calibrate --target-epsilon 3 --delta 1e-5"
    two = {"noise_multiplier": 1.0, "sampling_prob": 0.01}
    steps = int(said(capsys, f"{target} --noise-multiplier 1 --sampling-prob 0.01"))
    assert steps == calibrate_num_steps(target_epsilon=3, delta=1e-5, **two)
    prob = float(said(capsys, f"{target} --noise-multiplier 1 --num-steps 1000"))
    exact = calibrate_sampling_prob(
        target_epsilon=3, delta=1e-5, noise_multiplier=1.0, num_steps=1000
    )
    assert exact * (1 - 1e-5) <= prob <= exact
    noise = float(said(capsys, f"{target} --sampling-prob 0.01 --num-steps 1000"))
    assert (
        epsilon((StepEvent(noise_multiplier=noise, sampling_prob=0.01, count=1000),), delta=1e-5)
        <= 3
    )


def test_a_statement_has_what_the_log_says_in_three_forms(capsys, run_file):
    words = f"statement --log {run_file} --delta 1e-5"
    statement = Statement.of(
        read_run(run_file), delta=1e-5, released="every noisy gradient, and so all parameters"
    )
    assert said(capsys, words) == f"{statement}\n"
    assert said(capsys, f"{words} --markdown").strip() == statement.to_markdown().strip()
    whole = json.loads(said(capsys, f"{words} --json --caveat tuning --released weights"))
    assert (whole["unit"], whole["num_attempts"], whole["caveats"]) == ("patient", 2, ["tuning"])
    assert (whole["released"], whole["epsilon"]) == ("weights", statement.epsilon)
    assert "one hospital" in said(capsys, f"{words} --unit hospital")
    assert "remove one user" in said(capsys, f"statement {NUMBERS} --delta 1e-5 --unit user")


def test_verify_ends_with_three_for_a_log_that_is_not_as_it_was_written(capsys, run_file):
    head = verify_log(run_file).head
    assert head in said(capsys, f"verify {run_file}")
    assert json.loads(said(capsys, f"verify {run_file} --head {head} --json"))["whole"] is True
    assert cli.main(["verify", str(run_file), "--head", "0" * 64]) == 3
    assert "FAILS at line 5. No line has the expected head" in capsys.readouterr().out
    run_file.write_bytes(run_file.read_bytes().replace(b"500", b"501"))
    assert cli.main(["verify", str(run_file), "--json"]) == 3
    answer = json.loads(capsys.readouterr().out)
    assert (answer["whole"], answer["line"], answer["num_steps"]) == (False, 3, 1000)


def test_a_damaged_log_could_not_be_read_though_the_words_were_right(capsys, run_file):
    run_file.write_bytes(run_file.read_bytes().replace(b"500", b"501"))
    for verb in ("epsilon --delta 1e-5", "delta --epsilon 1", "statement --delta 1e-5"):
        assert cli.main([*verb.split(), "--log", str(run_file)]) == 1
        assert "line 3: Expected it to end in the SHA-256" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        f"profile {NUMBERS}",
        f"trade-off {NUMBERS}",
        f"budget {NUMBERS} --delta 1e-5 --target-epsilon 2",
        "planning --sampling-prob 1 --num-steps 9 --delta 1e-5 --sampling none",
    ],
)
def test_a_picture_of_each_kind_is_drawn(capsys, tmp_path, words):
    out = tmp_path / "picture.png"
    assert said(capsys, f"plot {words} --out {out}") == f"wrote {out}\n"
    assert out.read_bytes()[:4] == b"\x89PNG"


def test_without_matplotlib_it_says_what_to_install(capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert cli.main(f"plot profile {NUMBERS} --out {tmp_path / 'picture.png'}".split()) == 1
    assert "pip install dpfunc[plots]" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "said", "code"),
    [
        ("epsilon --delta 1e-5", "either --log, or all of", 2),
        ("epsilon --delta 1e-5 --log x --num-steps 3", "either --log, or all of", 2),
        ("epsilon --delta 1e-5 --log /nowhere/log.jsonl", "No such file", 1),
        (
            "epsilon --noise-multiplier 1 --sampling-prob 7 --num-steps 1 --delta 1e-5",
            "0 <= sampling_prob <= 1, got 7",
            2,
        ),
        ("", "required: VERB; dpfunc --help lists", 2),
        ("conjure", "invalid choice: 'conjure'", 2),
        ("epsilon --delta much", "--delta: invalid float value: 'much'", 2),
        (f"delta {NUMBERS}", "required: --epsilon", 2),
        ("calibrate --target-epsilon 3 --delta 1e-5 --num-steps 3", "to find the third", 2),
        (f"calibrate --target-epsilon 3 --delta 1e-5 {NUMBERS}", "to find the third", 2),
        (f"statement {NUMBERS} --delta 1e-5 --json --markdown", "not allowed with", 2),
        ("verify /nowhere/log.jsonl", "No such file", 1),
        ("plot planning --delta 1e-5 --num-steps 3 --out x", "required: --sampling-prob", 2),
        (f"plot profile {NUMBERS} --out /nowhere/x.png", "No such file", 1),
    ],
)
def test_errors_are_one_line_and_a_code(words, said, code, capsys):
    assert cli.main(words.split()) == code
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("dpfunc: ")
    assert said in printed.err
    assert printed.err.count("\n") == 1
