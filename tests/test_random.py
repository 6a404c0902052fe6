"""Keys and draws: RFC 8439, OpenSSL as oracle, the laws of the distributions, independence."""

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import scipy.stats
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from hypothesis import given
from hypothesis import strategies as st

from dpfunc import random
from dpfunc._chacha20 import cpu, normals, words

# RFC 8439, appendix A.1: test vectors 1 and 2 (key 0, nonce 0, counters 0 and 1).
RFC_ZERO_KEY = bytes.fromhex(
    "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
    "da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586"
    "9f07e7be5551387a98ba977c732d080dcb0f29a048e3656912c6533e32ee7aed"
    "29b721769ce64e43d57133b074d839d531ed1f28510afb45ace10a1f4b794d6f"
)
# RFC 8439, section 2.3.2: key 00 01 .. 1f, nonce 000000090000004a00000000, counter 1.
RFC_BLOCK = bytes.fromhex(
    "10f1e7e4d13b5915500fdd1fa32071c4c7d1f4c733c068030422aa9ac3d46c4e"
    "d2826446079faa0914c2d705d98b02a2b5129cd1de164eb9cbd083e8a2503c4e"
)


def openssl(key: torch.Tensor, num: int) -> np.ndarray:
    raw = key.numpy().astype("<u4").tobytes()
    stream = Cipher(algorithms.ChaCha20(raw, bytes(16)), None).encryptor().update(bytes(4 * num))
    return np.frombuffer(stream, "<u4").astype(np.int64)


def test_bits_are_the_rfc_keystream():
    stream = random.bits(torch.zeros(8, dtype=torch.int64), (32,))
    assert stream.numpy().astype("<u4").tobytes() == RFC_ZERO_KEY


def test_a_block_with_a_nonce_is_the_rfc_block():
    key = torch.from_numpy(np.frombuffer(bytes(range(32)), "<u4").astype(np.int64))[None]
    tag, data = 0x09000000, torch.tensor([0x4A000000])  # nonce bytes 00000009 0000004a 00000000
    assert words(key, tag, data, 16, 16).numpy().astype("<i4").tobytes() == RFC_BLOCK


@given(st.integers(), st.integers(0, 3000), st.integers(0, 3000))
def test_bits_agree_with_openssl_at_any_offset(seed, offset, num):
    key = random.key(seed)
    assert (
        random.bits(key, (num,), offset=offset).numpy() == openssl(key, offset + num)[offset:]
    ).all()


def test_bits_beyond_two_to_the_32_words_use_the_full_counter():
    key = random.key(5)
    block = 2**32 - 1
    raw = key.numpy().astype("<u4").tobytes()
    nonce = block.to_bytes(4, "little") + bytes(12)
    last = Cipher(algorithms.ChaCha20(raw, nonce), None).encryptor().update(bytes(64))
    got = random.bits(key, (16,), offset=2**36 - 16)
    assert got.numpy().astype("<u4").tobytes() == last
    with pytest.raises(ValueError, match="at most 2\\*\\*36 words"):
        random.bits(key, (17,), offset=2**36 - 16)


def test_keys_accept_any_integer_format_of_the_same_words():
    key = random.key(1)
    as_int32 = torch.from_numpy(key.numpy().astype("<u4").view("<i4").copy())
    assert random.bits(as_int32, (5,)).equal(random.bits(key, (5,)))


@given(st.integers(), st.integers(1, 2**70))
def test_different_seeds_give_different_keys(seed, gap):
    assert not random.key(seed).equal(random.key(seed + gap))


def test_seeds_that_agree_modulo_powers_of_two_differ():
    keys = [random.key(s) for s in (3, 3 + 2**32, 3 + 2**64, 3 + 2**256, -3, 10**5000)]
    assert len({tuple(k.tolist()) for k in keys}) == len(keys)


def test_a_key_without_a_seed_is_fresh_and_256_bits():
    keys = torch.stack([random.key() for _ in range(64)])
    assert len(keys.unique(dim=0)) == 64
    assert keys.min() >= 0
    assert 2**31 < keys.max() < 2**32


@given(st.integers(), st.integers(-(2**63), 2**63 - 1))
def test_fold_in_takes_ints_and_tensors_alike(seed, data):
    key = random.key(seed)
    assert random.fold_in(key, data).equal(random.fold_in(key, torch.tensor(data)))


def test_no_derived_key_agrees_with_another_or_with_the_output_stream():
    key = random.key(0)
    derived = [random.split(key, 50), random.bits(key, (50, 8))]
    derived += [random.fold_in(key, i)[None] for i in range(-20, 50)]
    for use in (random.SAMPLING, random.NOISE, random.LEAF, random.LOSS, random.DROPOUT):
        derived += [random.derive(key, use, list(range(50)))]
    everything = torch.cat(derived)
    assert len(everything.unique(dim=0)) == len(everything)
    assert len(everything.flatten().unique()) > everything.numel() - 3  # words, by birthday


def test_split_is_stable_under_its_count_and_differs_from_its_parent():
    key = random.key(4)
    assert random.split(key, 7)[:3].equal(random.split(key, 3))
    assert random.split(key, 0).shape == (0, 8)


DRAWS = [
    (random.normal, "norm", {}),
    (random.laplace, "laplace", {}),
    (random.uniform, "uniform", {}),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("draw", "law", "arguments"), DRAWS)
def test_the_law_is_accepted_and_the_law_scaled_by_two_percent_is_rejected(
    draw, law, arguments, dtype
):
    # At a scale 2 % off the distribution functions differ by 0.0037 or more (laplace), 3.7 / sqrt(n).
    x = draw(random.key(7), (1_000_000,), dtype=dtype, **arguments).double().numpy()
    right = scipy.stats.kstest(x, law).pvalue
    wrong = [scipy.stats.kstest(x * scale, law).pvalue for scale in (0.98, 1.02)]
    assert right > 0.01
    assert max(wrong) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_moments_and_tails_of_normals(dtype):
    x = random.normal(random.key(11), (4_000_000,), dtype=dtype).double()
    n = len(x)
    assert abs(x.mean()) < 4.5 / math.sqrt(n)
    assert abs(x.var() - 1) < 4.5 * math.sqrt(2 / n)
    assert abs((x**3).mean()) < 4.5 * math.sqrt(15 / n)
    assert abs((x**4).mean() - 3) < 4.5 * math.sqrt(96 / n)
    for bound in (2.0, 3.0, 4.0):
        expected = n * 2 * scipy.stats.norm.sf(bound)
        assert abs(int((x.abs() > bound).sum()) - expected) < 4.5 * math.sqrt(expected) + 1


def test_float32_normals_reach_beyond_six_and_a_half():
    """The rarest radius of all: x = 0 in the top half of a pair, at an angle of 0."""
    out = np.empty((1, 2, cpu.LANES), dtype=np.float32)
    radius, angle = np.empty((2, 1, cpu.LANES), dtype=np.float32)
    cpu._box_muller(np.zeros((1, 2, cpu.LANES), dtype="<i4"), out, radius, angle)
    assert 6.5 < out.max() < 6.7
    # The smallest radius: all bits set.
    cpu._box_muller(np.full((1, 2, cpu.LANES), -1, dtype="<i4"), out, radius, angle)
    assert np.isfinite(out).all()
    assert abs(out).max() < 1e-4


def test_threads_do_not_share_their_work_space():
    def draw(i):
        return random.normal(
            random.key(i), (200_000,), dtype=torch.float64 if i % 2 else torch.float32
        )

    alone = [draw(i) for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(draw, range(8)))
    assert all(a.equal(b) for a, b in zip(alone, together, strict=True))


@given(st.integers(0, 5000), st.integers(0, 5000), st.sampled_from([torch.float32, torch.float64]))
def test_a_slice_drawn_by_its_offset_is_the_slice_of_the_whole(offset, num, dtype):
    key = random.key(2)
    for draw in (random.normal, random.uniform, random.laplace):
        whole = draw(key, (offset + num,), dtype=dtype)
        assert draw(key, (num,), dtype=dtype, offset=offset).equal(whole[offset:])


def test_large_draws_join_their_chunks():
    key = random.key(3)
    whole = random.normal(key, (300_000,))
    assert random.normal(key, (1000,), offset=131_000).equal(whole[131_000:132_000])


def test_streams_of_different_keys_and_offsets_are_uncorrelated():
    n = 200_000
    key = random.key(21)
    streams = [random.normal(k, (n,)) for k in random.split(key, 4)]
    streams += [random.normal(random.fold_in(key, 1), (n,)), random.normal(key, (n,), offset=n)]
    streams += [streams[0].roll(1), streams[0].roll(512), streams[0].roll(1024)]
    correlation = torch.corrcoef(torch.stack(streams)).fill_diagonal_(0.0)
    assert correlation.abs().max() < 5 / math.sqrt(n)


def test_cosine_and_sine_halves_are_independent_beyond_correlation():
    x = random.normal(random.key(5), (2**20,)).reshape(-1, 2, 512)
    squares = (x**2 - 1).transpose(0, 1).flatten(1) / math.sqrt(2)
    assert abs((squares[0] * squares[1]).mean()) < 5 / math.sqrt(squares.shape[1])


def test_vmap_over_keys_and_data_equals_the_loop():
    keys = random.split(random.key(9), 3)
    data = torch.arange(3)

    def draw(key, i):
        key = random.fold_in(key, i)
        return (
            random.normal(key, (5,)),
            random.bits(random.split(key)[1], (2, 3)),
            random.uniform(key, ()),
        )

    mapped = torch.vmap(draw)(keys, data)
    for i in range(3):
        for a, b in zip(mapped, draw(keys[i], i), strict=True):
            assert a[i].equal(b)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_draws_have_the_bits_of_eager_ones(backend, fresh_compiler):
    def draw(key, step):
        key = random.fold_in(key, step)
        return (
            random.bits(key, (40,)),
            random.normal(key, (3, 5)),
            random.normal(key, (7,), dtype=torch.float64),
            random.uniform(key, (5,)),
            random.split(key, 3),
        )

    compiled = torch.compile(draw, fullgraph=True, backend=backend)
    for step in (0, 1, 2):
        for a, b in zip(
            compiled(random.key(0), torch.tensor(step)), draw(random.key(0), step), strict=True
        ):
            assert a.equal(b)


def test_empty_draws():
    assert random.normal(random.key(0), (0, 3)).shape == (0, 3)
    assert random.bits(random.key(0), (0,)).shape == (0,)
    assert normals(random.split(random.key(0), 0), 0, 4, torch.float32).shape == (0, 4)


@pytest.mark.parametrize(
    ("call", "kind", "words_"),
    [
        (lambda: random.key("1"), TypeError, "seed to be an int"),
        (lambda: random.key(True), TypeError, "seed to be an int"),
        (lambda: random.key(1.5), TypeError, "seed to be an int"),
        (lambda: random.split(torch.zeros(2, 8, dtype=torch.int64)), ValueError, r"shape \(8,\)"),
        (lambda: random.bits(torch.zeros(8), (1,)), ValueError, "integer tensor"),
        (lambda: random.bits(7, (1,)), ValueError, "integer tensor"),
        (lambda: random.split(random.key(0), -1), ValueError, "num >= 0"),
        (lambda: random.fold_in(random.key(0), 2**63), ValueError, "data"),
        (lambda: random.fold_in(random.key(0), torch.arange(2)), ValueError, "0-d"),
        (lambda: random.fold_in(random.key(0), torch.tensor(1.0)), TypeError, "data"),
        (lambda: random.fold_in(random.key(0), "a"), TypeError, "data"),
        (lambda: random.fold_in(random.key(0), [3]), TypeError, "data"),
        (
            lambda: random.fold_in(random.key(0), torch.tensor(3, dtype=torch.uint64)),
            TypeError,
            "data",
        ),
        (lambda: random.bits(torch.zeros(8, dtype=torch.uint8), (1,)), ValueError, "uint8"),
        (lambda: random.bits(random.key(0), 5), ValueError, "shape"),
        (lambda: random.bits(random.key(0), (-1,)), ValueError, "shape"),
        (lambda: random.bits(random.key(0), (1,), offset=1.5), ValueError, "offset"),
        (lambda: random.normal(random.key(0), (1,), dtype=torch.float16), ValueError, "dtype"),
        (lambda: random.uniform(random.key(0), (1,), offset=-1), ValueError, "offset"),
    ],
)
def test_bad_input_is_refused(call, kind, words_):
    with pytest.raises(kind, match=words_):
        call()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_device_makes_the_same_stream():
    key = random.key(1)
    on_device = key.to("cuda")
    assert (
        random.bits(on_device, (100_003,), offset=17)
        .cpu()
        .equal(random.bits(key, (100_003,), offset=17))
    )
    for dtype, atol in ((torch.float32, 2e-6), (torch.float64, 1e-14)):
        there = random.normal(on_device, (100_003,), dtype=dtype, offset=700)
        assert there.device.type == "cuda"
        here = random.normal(key, (100_003,), dtype=dtype, offset=700)
        torch.testing.assert_close(there.cpu(), here, rtol=1e-5, atol=atol)


def test_the_triton_kernels_make_the_same_stream_in_the_interpreter():
    """The kernels' logic without a device; skipped where Triton is not installed."""
    pytest.importorskip("triton")
    import os
    import subprocess
    import sys

    code = (
        "import torch; from dpfunc._chacha20 import cpu, cuda\n"
        "keys, data = torch.randint(0, 2**32, (2, 8)), torch.tensor([-3, 2**40 + 5])\n"
        "for s, n in ((0, 100), (37, 3000)):\n"
        "    assert cuda.words(keys, 7, data, s, n).equal(cpu.words(keys, 7, data, s, n))\n"
        "    for d in (torch.float32, torch.float64):\n"
        "        torch.testing.assert_close(cuda.normals(keys, s, n, d), cpu.normals(keys, s, n, d))\n"
    )
    subprocess.run(
        [sys.executable, "-c", code], check=True, env={**os.environ, "TRITON_INTERPRET": "1"}
    )
