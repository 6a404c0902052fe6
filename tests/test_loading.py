"""Where batches come from: workers, memory-mapped files, tables. What is loaded is never changed by how."""

import mmap
import os
import pickle
import random as python_random
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.utils.data import default_collate

from dpfunc import DPSGD, poisson_batches, poisson_indices, random
from dpfunc.sampling.sources import source

KEY = random.key(2026)
MECHANISM = DPSGD(clipping=1.0, noise_multiplier=1.0, sampling_prob=0.3, expected_batch_size=18)
RARE = DPSGD(clipping=1.0, noise_multiplier=1.0, sampling_prob=0.02, expected_batch_size=1)
WORKERS = pytest.mark.filterwarnings("ignore:This DataLoader will create")


def same(a, b):
    pairs = list(zip(a, b, strict=True))
    leaves = torch.utils._pytree.tree_leaves
    return all(
        x.equal(y) and x.dtype == y.dtype
        for p, q in pairs
        for x, y in zip(leaves(p), leaves(q), strict=True)
    )


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 60

    def __getitem__(self, i):
        return {"x": torch.full((2,), float(i)), "y": i}


class Drawing(Rows):
    """A data set with augmentation, from each of the global generators."""

    def __getitem__(self, i):
        return torch.tensor(
            [i, float(torch.rand(())), python_random.random(), np.random.random()],
            dtype=torch.float64,
        )


class Broken(Rows):
    def __getitem__(self, i):
        if i == 17:
            raise OSError("unreadable")
        return i


class BrokenBulk(Broken):
    def __getitems__(self, indices):
        return [self[i] for i in indices]


class NeedsNoOpening(Rows):
    """A data set whose first access says in which process it is."""

    opened_in = None

    def __getitem__(self, i):
        self.opened_in = self.opened_in or os.getpid()
        return torch.tensor([i, self.opened_in])


@WORKERS
@pytest.mark.parametrize("mechanism", [MECHANISM, RARE], ids=["usual", "with empty draws"])
@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_change_no_bit_also_of_empty_draws(mechanism, num_workers):
    here = list(poisson_batches(Rows(), KEY, mechanism, num_steps=12))
    there = list(poisson_batches(Rows(), KEY, mechanism, num_steps=12, num_workers=num_workers))
    assert same(here, there)
    assert (mechanism is RARE) == any(not batch.mask.any() for batch in there)


@WORKERS
def test_workers_cut_where_the_mechanism_says_so():
    cut = DPSGD(
        clipping=1.0,
        noise_multiplier=1.0,
        sampling_prob=0.3,
        expected_batch_size=18,
        sampling="truncated_poisson",
    )
    runs = [
        list(poisson_batches(Rows(), KEY, cut, num_steps=6, max_batch_size=15, num_workers=n))
        for n in (0, 2)
    ]
    assert same(*runs)
    assert max(int(batch.mask.sum()) for batch in runs[1]) == 15


@WORKERS
@pytest.mark.parametrize("stop", [0, 1, 5, 9])
def test_batches_loaded_ahead_do_not_shift_where_a_run_resumes(stop):
    whole = list(poisson_batches(Rows(), KEY, MECHANISM, num_steps=9))
    first = poisson_batches(Rows(), KEY, MECHANISM, num_steps=9, num_workers=2)
    begun = [next(first) for _ in range(stop)]
    first.close()  # with up to four batches loaded and not taken
    rest = poisson_batches(Rows(), KEY, MECHANISM, num_steps=9, start=stop, num_workers=2)
    assert same(whole, begun + list(rest))


KILLED = """
import os, signal, torch
from dpfunc import DPSGD, poisson_batches, random
data = list(range(60))
mechanism = DPSGD(clipping=1.0, noise_multiplier=1.0, sampling_prob=0.3, expected_batch_size=18)
batches = poisson_batches(data, random.key(2026), mechanism, num_steps=9, num_workers=2)
for _ in range(3):
    batch = next(batches)
    print(int(batch.step), batch.data[batch.mask].tolist(), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@WORKERS
def test_a_run_killed_with_batches_loaded_ahead_resumes_with_the_next(tmp_path):
    # To a file: a pipe would stay open until the orphaned workers see that they are alone.
    with open(tmp_path / "printed", "w") as printed:
        killed = subprocess.run([sys.executable, "-c", KILLED], stdout=printed)
    assert killed.returncode == -signal.SIGKILL
    rest = poisson_batches(list(range(60)), KEY, MECHANISM, num_steps=9, start=3, num_workers=1)
    lines = (tmp_path / "printed").read_text().splitlines() + [
        f"{int(batch.step)} {batch.data[batch.mask].tolist()}" for batch in rest
    ]
    drawn = [poisson_indices(60, KEY, t, sampling_prob=0.3).tolist() for t in range(9)]
    assert lines == [f"{t} {indices}" for t, indices in enumerate(drawn)]


@WORKERS
def test_what_a_data_set_draws_in_workers_is_a_function_of_key_and_step():
    def run(key, **options):
        return list(poisson_batches(Drawing(), key, MECHANISM, num_steps=6, **options))

    one, two = run(KEY, num_workers=1), run(KEY, num_workers=2)
    assert same(one, two)
    assert same(one[4:], run(KEY, num_workers=2, start=4))
    drawn = torch.cat([batch.data[batch.mask, 1:] for batch in one])
    assert len(drawn.unique()) == drawn.numel(), "steps and generators differ"
    other = torch.cat([batch.data[batch.mask, 1:] for batch in run(random.key(1), num_workers=1)])
    assert not torch.isin(other, drawn).any()


@WORKERS
@pytest.mark.parametrize("num_workers", [0, 2])
def test_no_global_generator_moves(num_workers):
    before = torch.get_rng_state(), python_random.getstate(), np.random.get_state()[1].tolist()
    list(poisson_batches(Rows(), KEY, MECHANISM, num_steps=4, num_workers=num_workers))
    assert torch.get_rng_state().equal(before[0])
    assert python_random.getstate() == before[1]
    assert np.random.get_state()[1].tolist() == before[2]


@WORKERS
def test_a_data_set_for_workers_is_opened_in_them_alone():
    """A file opened before the fork would share its position with every worker."""
    batches = poisson_batches(NeedsNoOpening(), KEY, RARE, num_steps=40, num_workers=2)
    opened = torch.cat([batch.data[batch.mask, 1] for batch in batches])
    assert len(opened)
    assert os.getpid() not in opened.tolist()


@WORKERS
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("data", [Broken(), BrokenBulk()], ids=["one by one", "in bulk"])
def test_an_example_that_does_not_load_is_named(data, num_workers):
    with pytest.raises(RuntimeError, match=r"data\[17\] to load, got OSError: unreadable"):
        list(poisson_batches(data, KEY, MECHANISM, num_steps=9, num_workers=num_workers))


@WORKERS
@pytest.mark.parametrize("data", [Rows(), Broken()], ids=["closed", "failed"])
def test_no_worker_outlives_the_batches(data):
    batches = poisson_batches(data, KEY, MECHANISM, num_steps=9, num_workers=2)
    if isinstance(data, Broken):
        with pytest.raises(RuntimeError):
            list(batches)
    else:
        next(batches)
        assert len(torch.multiprocessing.active_children()) == 2
        batches.close()
    assert not torch.multiprocessing.active_children()


def test_an_error_of_the_whole_bulk_is_its_own():
    class Bulk(Rows):
        def __getitems__(self, indices):
            if len(indices) > 1:
                raise OSError("too many")
            return [self[i] for i in indices]

    with pytest.raises(OSError, match="too many"):
        list(poisson_batches(Bulk(), KEY, MECHANISM, num_steps=1))


def columns(directory, num):
    x = np.memmap(directory / "x", dtype=np.float32, mode="w+", shape=(num, 4))
    y = np.memmap(directory / "y", dtype=np.int64, mode="w+", shape=(num,))
    return {"x": x, "y": y}


@WORKERS
@pytest.mark.parametrize("num_workers", [0, 2])
def test_memory_mapped_columns_give_the_batches_of_tensors(tmp_path, num_workers):
    written = columns(tmp_path, 300)
    written["x"][:] = np.arange(1200).reshape(300, 4)
    written["y"][:] = np.arange(300)
    shapes = {"x": (np.float32, (300, 4)), "y": (np.int64, (300,))}
    read = {n: np.memmap(tmp_path / n, dtype=d, mode="r", shape=s) for n, (d, s) in shapes.items()}
    tensors = {name: torch.tensor(np.array(leaf)) for name, leaf in read.items()}
    for mechanism in (MECHANISM, RARE):
        expected = list(poisson_batches(tensors, KEY, mechanism, num_steps=9))
        for data in (read, {"x": tensors["x"], "y": read["y"]}):
            found = poisson_batches(data, KEY, mechanism, num_steps=9, num_workers=num_workers)
            assert same(expected, found)


def test_two_billion_rows_on_disk_are_read_where_they_are_drawn(tmp_path):
    """A file with holes: 64 GB long, and as large on disk as the rows written."""
    num = 2 * 10**9
    x = np.memmap(tmp_path / "x", dtype=np.float32, mode="w+", shape=(num, 8))
    few = DPSGD(clipping=1.0, noise_multiplier=1.0, sampling_prob=1e-8, expected_batch_size=20)
    drawn = poisson_indices(num, KEY, 0, sampling_prob=1e-8)
    x[drawn.numpy()] = drawn[:, None].numpy() % 1000 + 1
    batch = next(poisson_batches(x, KEY, few, num_steps=1))
    assert len(drawn)
    assert batch.data[batch.mask].equal((drawn % 1000 + 1.0)[:, None].expand(-1, 8))
    assert os.stat(tmp_path / "x").st_blocks * 512 < 2**24


@pytest.mark.parametrize(
    ("view", "mapped"),
    [
        (lambda x: x, True),
        (lambda x: x[5:], True),
        (lambda x: np.asarray(x)[::-1].T[0], True),
        (lambda x: x[:, :2] + 1, False),
    ],
    ids=["whole", "slice", "array", "copy"],
)
def test_the_system_is_told_that_reads_are_scattered(tmp_path, monkeypatch, view, mapped):
    """A whole test of it would time a disk: `./dev bench sampling` does, a thousand to one."""
    told = []
    advise = mmap.mmap.madvise

    class Map(mmap.mmap):
        def madvise(self, option):
            told.append(option)
            return advise(self, option)

    monkeypatch.setattr(mmap, "mmap", Map)
    data = view(np.memmap(tmp_path / "x", dtype=np.float32, mode="w+", shape=(60, 4)))
    next(poisson_batches(data, KEY, MECHANISM, num_steps=1))
    assert told == [mmap.MADV_RANDOM] * mapped


@pytest.mark.parametrize(
    "array",
    [
        np.arange(120.0)[::-2],
        np.asfortranarray(np.arange(180.0).reshape(60, 3)),
        np.arange(60, dtype=">i4"),
        np.arange(60) % 2 == 0,
        np.arange(60, dtype=np.float16),
        np.arange(60, dtype=np.uint16),
    ],
    ids=["backwards", "columns first", "big endian", "bool", "float16", "uint16"],
)
def test_arrays_of_any_layout_are_columns(array):
    native = np.ascontiguousarray(array.astype(array.dtype.newbyteorder("=")))
    expected = list(poisson_batches(torch.from_numpy(native), KEY, MECHANISM, num_steps=3))
    assert same(expected, poisson_batches(array, KEY, MECHANISM, num_steps=3))


@pytest.mark.parametrize(
    ("data", "kind", "words"),
    [
        (np.array(["a", "b"]), TypeError, "an array of <U1"),
        (np.zeros(3, dtype=[("a", "f4")]), TypeError, "numeric arrays"),
        ({"x": np.zeros(())}, ValueError, "0-d"),
        ({"x": np.zeros(3), "y": torch.zeros(2)}, ValueError, "same leading"),
        ({"x": np.zeros(3), "y": [1, 2, 3]}, TypeError, "got int"),
    ],
)
def test_arrays_that_are_no_columns_are_refused_at_the_call(data, kind, words):
    with pytest.raises(kind, match=words):
        poisson_batches(data, KEY, MECHANISM, num_steps=1)


def test_workers_are_refused_what_they_cannot_read(tmp_path, monkeypatch):
    elsewhere = torch.zeros(60, device="meta")
    with pytest.raises(ValueError, match="on the CPU"):
        poisson_batches(elsewhere, KEY, MECHANISM, num_steps=1, num_workers=1)
    data = columns(tmp_path, 60)
    monkeypatch.setattr(torch.multiprocessing, "get_start_method", lambda: "spawn")
    with pytest.raises(ValueError, match="do not fork"):
        poisson_batches(data, KEY, MECHANISM, num_steps=1, num_workers=1)
    for wrong, kind in ((-1, ValueError), (1.5, TypeError), (True, TypeError)):
        with pytest.raises(kind, match="num_workers"):
            poisson_batches(Rows(), KEY, MECHANISM, num_steps=1, num_workers=wrong)


def test_what_a_worker_is_given_can_be_sent_to_a_process_that_does_not_fork():
    for data in (torch.arange(60), np.arange(60), list(range(60))):
        _, gather = source(data, default_collate)
        sent = pickle.loads(pickle.dumps(gather))
        for indices in (torch.tensor([2, 7]), torch.empty(0, dtype=torch.int64)):
            assert sent(indices).equal(indices)


@pytest.fixture
def table():
    datasets = pytest.importorskip("datasets")
    return datasets.Dataset.from_dict(
        {"x": [[float(i)] * 3 for i in range(60)], "label": list(range(60))}
    )


@WORKERS
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_hugging_face_table_gives_the_batches_of_columns(table, num_workers):
    tensors = {"x": torch.arange(60.0)[:, None].expand(60, 3), "label": torch.arange(60)}
    for mechanism in (MECHANISM, RARE):
        expected = list(poisson_batches(tensors, KEY, mechanism, num_steps=9))
        found = poisson_batches(table, KEY, mechanism, num_steps=9, num_workers=num_workers)
        assert same(expected, found)


def test_a_table_keeps_the_format_it_was_given_and_its_rows_go_to_the_users_collate(table):
    given = table.with_format("numpy", columns=["label"])
    batch = next(poisson_batches(given, KEY, MECHANISM, num_steps=1))
    assert list(batch.data) == ["label"]

    def collate(rows):
        assert all(isinstance(row["x"], list) for row in rows)
        return torch.tensor([row["label"] for row in rows])

    batch = next(poisson_batches(table, KEY, MECHANISM, num_steps=1, collate=collate))
    drawn = poisson_indices(60, KEY, 0, sampling_prob=0.3)
    assert batch.data[batch.mask].equal(drawn)


def test_a_table_with_words_is_refused_at_the_call(table):
    words = table.add_column("text", ["a"] * 60)
    with pytest.raises(TypeError, match="got a str"):
        poisson_batches(words, KEY, MECHANISM, num_steps=1)
