"""Noise: its scale is right and 10 % off would be seen; independent over leaf, step and key."""

import pytest
import torch

from dpfunc import DPSGD, clip_and_noise, random
from dpfunc._chacha20 import add_normals, normals
from dpfunc.noise import privatize
from dpfunc.testing import laws


def mechanism(**changes):
    fields = {
        "clipping": 0.5,
        "noise_multiplier": 3.0,
        "sampling_prob": 0.1,
        "expected_batch_size": 20.0,
    }
    return DPSGD(**{**fields, **changes})


def test_the_standard_deviation_is_multiplier_times_sensitivity_over_expected_batch_size():
    laws.noise_is_calibrated(mechanism(), num=200_000, error_rate=2e-3)
    noise = privatize({"w": torch.zeros(400, 500)}, random.key(1), mechanism())["w"]
    laws.numbers_follow(noise, 3.0 * 0.5 / 20.0, error_rate=2e-3)
    for scale in (0.9, 1.1):
        with pytest.raises(AssertionError, match=r"the scale of 200000 numbers is"):
            laws.numbers_follow(noise, scale * 3.0 * 0.5 / 20.0)


def test_the_signal_is_divided_by_the_public_size_after_the_noise():
    quiet = mechanism(noise_multiplier=0.0)
    assert privatize({"w": torch.tensor([4.0])}, random.key(0), quiet)["w"].equal(
        torch.tensor([0.2])
    )
    laws.signal_is_kept({"w": torch.tensor([4.0, 8.0])}, mechanism(), key=random.key(3))


def test_neither_noise_nor_divisor_depend_on_the_batch():
    key = random.key(1)
    for num in (0, 1, 7):
        noisy = clip_and_noise(torch.zeros(num, 5), key, mechanism())
        assert noisy.equal(privatize(torch.zeros(5), key, mechanism()))


def test_leaves_and_keys_have_independent_noise():
    laws.noise_is_independent(mechanism(), key=random.key(8), num=50_000)


def test_noise_of_a_leaf_depends_on_its_path_alone():
    key = random.key(2)
    both = privatize({"z": torch.zeros(5), "a": torch.zeros(4)}, key, mechanism())
    reordered = privatize({"a": torch.zeros(4), "z": torch.zeros(5)}, key, mechanism())
    alone = privatize({"z": torch.zeros(5)}, key, mechanism())
    assert both["z"].equal(reordered["z"])
    assert both["z"].equal(alone["z"])


def test_paths_that_print_alike_are_different_paths():
    key = random.key(2)
    keyed = [
        {"0": torch.zeros(9)},
        {0: torch.zeros(9)},
        {"a": {"b": torch.zeros(9)}},
        {"a.b": torch.zeros(9)},
    ]
    noises = [
        torch.cat([x.flatten() for x in _leaves(privatize(t, key, mechanism()))]) for t in keyed
    ]
    assert len(torch.stack(noises).unique(dim=0)) == len(noises)


def _leaves(tree):
    return [
        leaf
        for value in tree.values()
        for leaf in (_leaves(value) if isinstance(value, dict) else [value])
    ]


def test_float64_sums_get_float64_noise_and_short_formats_are_refused():
    noisy = privatize({"w": torch.zeros(3, dtype=torch.float64)}, random.key(0), mechanism())
    assert noisy["w"].dtype == torch.float64
    with pytest.raises(TypeError, match=r"float32 or float64, got torch\.bfloat16"):
        privatize({"w": torch.zeros(3, dtype=torch.bfloat16)}, random.key(0), mechanism())


def test_clip_and_noise_in_half_precision_adds_float32_noise():
    noisy = clip_and_noise(
        {"w": torch.ones(4, 1000, dtype=torch.float16)}, random.key(0), mechanism()
    )
    assert noisy["w"].dtype == torch.float32
    assert len(noisy["w"].unique()) > 990  # float16 noise would repeat


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_tensor_multiplier_loses_nothing_to_its_format(dtype):
    tiny = mechanism(clipping=1e-8, noise_multiplier=1.0)
    total = {"w": torch.zeros(50)}
    expected = privatize(total, random.key(0), tiny)
    multiplier = torch.tensor(1.0, dtype=dtype, requires_grad=True)
    noisy = privatize(total, random.key(0), tiny, multiplier)
    assert noisy["w"].equal(expected["w"])
    assert not noisy["w"].requires_grad


def test_a_multiplier_that_is_no_real_number_is_refused():
    for bad in (torch.tensor(True), torch.tensor(1), torch.tensor(1j)):
        with pytest.raises(TypeError, match="noise_multiplier to be a 0-d floating-point"):
            privatize({"w": torch.zeros(3)}, random.key(0), mechanism(), bad)


def test_noise_that_float32_would_lose_is_refused():
    with pytest.raises(ValueError, match="float32 would lose the noise"):
        mechanism(clipping=1e-30, noise_multiplier=1e-16)


@pytest.mark.parametrize(
    "fields",
    [
        {"mechanism": "laplace"},
        {"sampling": "fixed_without_replacement"},
        {"sampling": "none"},
        {"relation": "both"},
        {"expected_batch_size": 0},
        {"noise_multiplier": float("inf")},
    ],
)
def test_a_mechanism_that_nothing_here_runs_is_refused(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        mechanism(**fields)


def test_key_and_mechanism_in_the_wrong_order_are_told():
    with pytest.raises(TypeError, match=r"mechanism to be a dpfunc\.DPSGD, got Tensor"):
        clip_and_noise(torch.zeros(2, 3), mechanism(), random.key(0))


class TestAddNormals:
    """Noise that is added while it is in cache."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("num", [0, 1, 1023, 1024, 1025, 150_001])
    def test_it_has_the_bits_of_noise_that_is_written_down(self, num, dtype):
        keys, scales = random.split(random.key(3), 2), torch.tensor([0.3, 7.0], dtype=dtype)
        totals = random.normal(random.key(2), (2, 2 * num), dtype=dtype)[:, ::2]
        before = totals.clone()
        written = totals + scales.unsqueeze(1) * normals(keys, 0, num, dtype)
        assert add_normals(totals, keys, scales).equal(written)
        assert totals.equal(before)

    def test_mapped_it_equals_the_loop(self):
        keys, totals = random.split(random.key(4), 3), random.normal(random.key(2), (3, 2, 5))
        one = lambda total, key: add_normals(total, torch.stack([key, key + 1]), torch.ones(2))  # noqa: E731
        mapped = torch.vmap(one)(totals, keys)
        assert mapped.equal(torch.stack([one(t, k) for t, k in zip(totals, keys, strict=True)]))
        assert torch.vmap(one, (None, 0))(totals[0], keys)[2].equal(one(totals[0], keys[2]))

    def test_a_leaf_longer_than_a_stream_is_refused(self):
        long = torch.zeros(1, 1).expand(1, 2**36)
        with pytest.raises(ValueError, match="2\\*\\*36 words"):
            add_normals(long, random.key(0).unsqueeze(0), torch.ones(1))

    def test_a_release_has_the_derivatives_of_its_sum(self):
        def release(total):
            return privatize(total, random.key(5), mechanism())

        total = torch.ones(3)
        assert torch.func.jacrev(release)(total).equal(torch.eye(3) / 20)
        value, tangent = torch.func.jvp(release, (total,), (total,))
        assert tangent.equal(total / 20)
        assert value.equal(release(total))
