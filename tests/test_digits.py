"""The README's run, the files it leaves, and the command line around it."""

import json
import re
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from sklearn import datasets

from dpfunc import Statement, StepEvent, cli, digits, fit, random, read_log, trees, verify_log

EVENT = StepEvent(noise_multiplier=1.0, sampling_prob=0.01, count=1000)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One real run, in a process of its own."""
    out = tmp_path_factory.mktemp("run")
    command = [sys.executable, "-m", "dpfunc.cli", "train", "--seed", "1", "--out", str(out)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return out, done.stdout, done.stderr


def test_it_trains_to_nine_in_ten_within_the_budget(finished):
    _, printed, _ = finished
    accuracy = float(printed.split("test accuracy ")[1].split()[0])
    assert accuracy >= 0.90
    assert "(3, 1e-05)-differential privacy" in printed
    for words in (
        "add or remove one",
        "Poisson sample",
        "pld, an upper bound",
        "params.safetensors",
    ):
        assert words in " ".join(printed.split())
    assert "tuning is not accounted" in " ".join(printed.split())
    assert "reproducible, not private to whoever knows it" in " ".join(printed.split())


def test_the_progress_bar_shows_epsilon_and_held_out_accuracy_and_no_training_loss(finished):
    _, _, progress = finished
    assert "60/60" in progress
    assert re.search(r"epsilon 3, \S+ examples/s, validation accuracy 0.9", progress)
    assert "loss" not in progress


def test_it_leaves_a_log_parameters_a_statement_and_a_private_picture(finished):
    out, _, _ = finished
    assert sorted(p.name for p in out.iterdir()) == [
        "checkpoint.safetensors",
        "key.SECRET",
        "log.jsonl",
        "params.safetensors",
        "run.PRIVATE.png",
        "statement.txt",
    ]
    log = read_log(out / "log.jsonl")
    assert sum(event.count for event in log) == 60
    statement = Statement(log=log, delta=1e-5, released="")
    assert 2.99 < statement.epsilon <= 3.0
    with safe_open(out / "params.safetensors", "pt") as file:
        assert json.loads(file.metadata()["statement"])["epsilon"] == statement.epsilon
        weights = file.get_tensor("readout.weight")
    assert weights.shape == (10, 384)
    assert (out / "run.PRIVATE.png").read_bytes()[:4] == b"\x89PNG"


def test_no_key_is_in_any_file_but_its_own(finished):
    out, printed, _ = finished
    key = random.key(1)
    raw = key.numpy().astype("<u4").tobytes()
    public = [p for p in out.iterdir() if p.name != "key.SECRET"]
    for content in [*(p.read_bytes() for p in public), printed.encode()]:
        assert raw not in content
        assert raw.hex().encode() not in content
        assert not any(str(word).encode() in content for word in key.tolist())


def run(seed, num_steps=5, name="digits"):
    data, settings = digits.load(name), digits.SETTINGS[name]
    mechanism = digits.mechanism_for(data, settings, 3.0, 1e-5)
    key = random.key(seed)
    module = digits.Network(data.train.images.shape[-1], settings, random.split(key)[0])
    pair, params = digits.pair(module, settings, mechanism)
    return fit(
        pair,
        params,
        tuple(data.train),
        mechanism,
        key,
        num_steps=num_steps,
        delta=1e-5,
        progress=False,
    )


@pytest.mark.uses_global_generator  # nn's own initialisation, overwritten
def test_a_seed_reproduces_a_run_bit_for_bit_and_no_seed_is_fresh():
    first, second, other, fresh = run(3), run(3), run(4), run(None)
    for a, b in zip(trees.leaves(first.state), trees.leaves(second.state), strict=True):
        assert a.equal(b)
    for different in (other, fresh):
        assert not first.params["readout.weight"].equal(different.params["readout.weight"])
    assert [event.count for event in first.log] == [5]


def test_splits_are_disjoint_and_whole():
    data = digits.load("digits")
    assert [len(split.labels) for split in data] == [1124, 224, 449]
    rows = torch.cat([split.images.flatten(1) for split in data]).numpy()
    images = np.float32(datasets.load_digits(return_X_y=True)[0] / 16.0)
    assert sorted(map(bytes, rows)) == sorted(map(bytes, images))


@pytest.mark.uses_global_generator  # nn's own initialisation, overwritten
def test_mnist_takes_the_same_path(monkeypatch):
    rng = np.random.default_rng(0)
    fake = (rng.integers(0, 256, (1200, 784)).astype(float), rng.integers(0, 10, 1200).astype(str))
    monkeypatch.setattr(datasets, "fetch_openml", lambda *a, **k: fake)
    data = digits.load("mnist")
    assert data.train.images.shape[1:] == (1, 28, 28)
    assert float(data.train.images.max()) == 1.0
    assert int(run(0, num_steps=1, name="mnist").state.step) == 1


def test_mnist_offline_says_so_and_names_the_way_out(monkeypatch, capsys, tmp_path):
    def offline(*arguments, **options):
        raise OSError("no route to host")

    monkeypatch.setattr(datasets, "fetch_openml", offline)
    assert cli.main(["train", "--data", "mnist", "--out", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert "Could not download MNIST" in said
    assert "--data digits" in said


@pytest.mark.uses_global_generator  # nn's own initialisation, overwritten
def test_an_interrupt_keeps_what_ran_and_the_same_command_goes_on(monkeypatch, capsys, tmp_path):
    real, seen = digits.accuracy, []

    def interrupting(*arguments):
        seen.append(None)
        if len(seen) == 4:
            signal.raise_signal(signal.SIGINT)
        return real(*arguments)

    monkeypatch.setattr(digits, "accuracy", interrupting)
    command = ["train", "--seed", "2", "--out", str(tmp_path)]
    assert cli.main(command) == 0
    assert "Stopped after step 4; the same command goes on" in capsys.readouterr().err
    assert sum(event.count for event in read_log(tmp_path / "log.jsonl")) == 4
    assert cli.main(["train", "--out", str(tmp_path)]) == 2  # with a seed it began
    assert "the key comes from a seed" in capsys.readouterr().err
    assert cli.main([*command, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["num_steps"], answer["stopped"]) == (60, "done")
    assert answer["test_accuracy"] > 0.9
    assert sum(event.count for event in read_log(tmp_path / "log.jsonl")) == 60
    assert verify_log(tmp_path / "log.jsonl")


@pytest.mark.uses_global_generator  # nn's own initialisation, overwritten
def test_a_finished_run_is_never_written_over(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(digits.SETTINGS, "digits", replace(digits.SETTINGS["digits"], num_steps=2))
    for folder in ("run", "run-2"):
        assert cli.main(["train"]) == 0
        assert f"to {folder}/" in capsys.readouterr().out
