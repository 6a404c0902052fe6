"""The README's run, the files it leaves, and the command line around it."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors import safe_open
from sklearn import datasets

from dpfunc import Statement, StepEvent, cli, digits, random, read_log

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
    assert "epsilon 3.000, validation accuracy 0.9" in progress
    assert "loss" not in progress


def test_it_leaves_a_log_parameters_a_statement_and_a_private_picture(finished):
    out, _, _ = finished
    assert sorted(p.name for p in out.iterdir()) == [
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


def test_no_key_is_in_any_file(finished):
    out, printed, _ = finished
    key = random.key(1)
    raw = key.numpy().astype("<u4").tobytes()
    for content in [*(p.read_bytes() for p in out.iterdir()), printed.encode()]:
        assert raw not in content
        assert raw.hex().encode() not in content
        assert not any(str(word).encode() in content for word in key.tolist())


def run(seed, steps=5):
    data, settings = digits.load("digits"), digits.SETTINGS["digits"]
    mechanism = digits.mechanism_for(data, settings, 3.0, 1e-5)
    key = random.key(seed)
    module = digits.Network(8, settings, random.split(key)[0])
    iterator = digits.train(module, data, settings, mechanism, 1e-5, key)
    return [next(iterator) for _ in range(steps)]


@pytest.mark.uses_global_generator  # nn's own initialisation, overwritten
def test_a_seed_reproduces_a_run_bit_for_bit_and_no_seed_is_fresh():
    first, second, other, fresh = run(3), run(3), run(4), run(None)
    assert all(
        a.equal(b)
        for a, b in zip(first[-1].params.values(), second[-1].params.values(), strict=True)
    )
    for different in (other, fresh):
        assert not first[-1].params["readout.weight"].equal(different[-1].params["readout.weight"])
    spent = [progress.epsilon for progress in first]
    assert spent == sorted(spent)
    assert [event.count for event in first[-1].log] == [5]


def test_splits_are_disjoint_and_whole():
    data = digits.load("digits")
    assert [len(split.labels) for split in data] == [1124, 224, 449]
    rows = torch.cat([split.images.flatten(1) for split in data]).numpy()
    images = np.float32(datasets.load_digits(return_X_y=True)[0] / 16.0)
    assert sorted(map(bytes, rows)) == sorted(map(bytes, images))


def test_mnist_takes_the_same_path(monkeypatch):
    rng = np.random.default_rng(0)
    fake = (rng.integers(0, 256, (1200, 784)).astype(float), rng.integers(0, 10, 1200).astype(str))
    monkeypatch.setattr(datasets, "fetch_openml", lambda *a, **k: fake)
    data = digits.load("mnist")
    assert data.train.images.shape[1:] == (1, 28, 28)
    assert float(data.train.images.max()) == 1.0
    settings = digits.SETTINGS["mnist"]
    mechanism = digits.mechanism_for(data, settings, 3.0, 1e-5)
    state = torch.get_rng_state()
    module = digits.Network(28, settings, random.key(0))
    torch.set_rng_state(state)
    progress = next(digits.train(module, data, settings, mechanism, 1e-5, random.key(0)))
    assert progress.step == 1


def test_mnist_offline_says_so_and_names_the_way_out(monkeypatch, capsys, tmp_path):
    def offline(*arguments, **options):
        raise OSError("no route to host")

    monkeypatch.setattr(datasets, "fetch_openml", offline)
    assert cli.main(["train", "--data", "mnist", "--out", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert "Could not download MNIST" in said
    assert "--data digits" in said


def test_an_interrupt_keeps_what_ran(monkeypatch, capsys, tmp_path):
    real = digits.train

    def interrupted(*arguments):
        for progress in real(*arguments):
            if progress.step == 4:
                raise KeyboardInterrupt
            yield progress

    monkeypatch.setattr(digits, "train", interrupted)
    state = torch.get_rng_state()
    assert cli.main(["train", "--out", str(tmp_path)]) == 0
    torch.set_rng_state(state)
    assert sum(event.count for event in read_log(tmp_path / "log.jsonl")) == 3
    assert "Stopped" in capsys.readouterr().err
