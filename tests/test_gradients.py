"""Per-sample gradients and their clipped sum: a float64 loop as oracle, then the traps."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from dpfunc import clip_and_sum, clipped_grad, per_sample_grads, random, trees


def mlp_loss(params, example):
    x, y = example["x"], example["y"]
    h = torch.tanh(x @ params["in"]["w"] + params["in"]["b"])
    return F.cross_entropy(h @ params["out"], y)


def mlp_case(num, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    params = {
        "in": {"w": torch.randn(5, 7, generator=g, dtype=dtype), "b": torch.zeros(7, dtype=dtype)},
        "out": torch.randn(7, 3, generator=g, dtype=dtype),
    }
    data = {
        "x": torch.randn(num, 5, generator=g, dtype=dtype),
        "y": torch.randint(0, 3, (num,), generator=g),
    }
    return params, data


def loop_grads(loss, params, data, num):
    """The specification: one example at a time, by plain autograd, in float64."""
    params = trees.map(lambda p: p.double().requires_grad_(), params)
    rows = []
    for i in range(num):
        example = trees.map(
            lambda leaf, i=i: leaf[i].double() if leaf.is_floating_point() else leaf[i], data
        )
        rows.append(torch.autograd.grad(loss(params, example), trees.leaves(params)))
    return [torch.stack(column) for column in zip(*rows, strict=True)]


def assert_trees_close(a, b, rtol=2e-5, atol=2e-5):
    for x, y in zip(trees.leaves(a), trees.leaves(b), strict=True):
        torch.testing.assert_close(x, y, rtol=rtol, atol=atol, check_dtype=False)


def test_per_sample_grads_equal_a_float64_loop():
    params, data = mlp_case(9)
    got = per_sample_grads(mlp_loss)(params, data)
    assert_trees_close(trees.leaves(got), loop_grads(mlp_loss, params, data, 9))


@given(st.integers(1, 12), st.integers(1, 5), st.integers(0, 1000))
def test_chunks_change_nothing_but_rounding(num, chunk_size, seed):
    params, data = mlp_case(num, seed=seed)
    mask = torch.arange(num) % 3 != 1
    whole = clipped_grad(mlp_loss, 0.7)(params, data, mask=mask)
    parts = clipped_grad(mlp_loss, 0.7, chunk_size=chunk_size)(params, data, mask=mask)
    assert_trees_close(whole.sum, parts.sum)
    assert_trees_close(whole.norms, parts.norms)
    assert_trees_close(
        per_sample_grads(mlp_loss, chunk_size=chunk_size)(params, data),
        per_sample_grads(mlp_loss)(params, data),
    )


def test_clipped_grad_is_the_clipped_sum_of_the_loop():
    params, data = mlp_case(9)
    rows = loop_grads(mlp_loss, params, data, 9)
    norms = sum(r.flatten(1).square().sum(1) for r in rows).sqrt()
    scale = (0.5 / norms).clamp(max=1)
    expected = [torch.einsum("b,b...->...", scale, r) for r in rows]
    clipped = clipped_grad(mlp_loss, 0.5)(params, data)
    assert_trees_close(trees.leaves(clipped.sum), expected)
    assert_trees_close(clipped.norms, norms)


def test_padding_rows_may_hold_anything():
    params, data = mlp_case(6)
    mask = torch.tensor([True, True, False, True, False, True])
    f = clipped_grad(mlp_loss, 1.0)
    reference = f(params, trees.map(lambda leaf: leaf[mask], data))
    for filler in (0.0, float("nan"), float("inf"), 1e30):
        x = torch.where(mask[:, None], data["x"], filler)
        clipped = f(params, {"x": x, "y": data["y"]}, mask=mask)
        assert_trees_close(clipped.sum, reference.sum)
        assert (clipped.norms[~mask] == 0).all()


def test_a_poisoned_example_vanishes_and_the_others_stay():
    params, data = mlp_case(4)
    data["x"][2, 0] = float("nan")
    clipped = clipped_grad(mlp_loss, 1.0)(params, data)
    others = trees.map(lambda leaf: leaf[[0, 1, 3]], data)
    assert_trees_close(clipped.sum, clipped_grad(mlp_loss, 1.0)(params, others).sum)


@pytest.mark.parametrize("chunk_size", [None, 3])
def test_an_empty_batch_gives_zeros_and_empty_rows(chunk_size):
    params, data = mlp_case(0)
    grads = per_sample_grads(mlp_loss, chunk_size=chunk_size)(params, data)
    assert grads["in"]["w"].shape == (0, 5, 7)
    clipped = clipped_grad(mlp_loss, 1.0, chunk_size=chunk_size)(params, data)
    assert_trees_close(clipped.sum, trees.map(torch.zeros_like, params))
    assert clipped.norms.shape == (0,)


def test_aux_comes_back_per_example():
    def loss(params, example):
        value = mlp_loss(params, example)
        return value, {"loss": value, "x": example["x"][:2]}

    params, data = mlp_case(5)
    grads, aux = per_sample_grads(loss, has_aux=True)(params, data)
    assert grads["out"].shape == (5, 7, 3)
    assert aux["x"].equal(data["x"][:, :2])
    clipped = clipped_grad(loss, 1.0, has_aux=True, chunk_size=2)(params, data)
    assert clipped.aux["x"].equal(data["x"][:, :2])
    torch.testing.assert_close(clipped.aux["loss"], aux["loss"])
    empty = clipped_grad(loss, 1.0, has_aux=True)(params, mlp_case(0)[1])
    assert empty.aux["x"].shape == (0, 2)


def noisy_loss(params, example, key):
    return (params * (example + random.normal(key, example.shape))).sum()


def test_keys_differ_over_examples_and_not_over_chunks_padding_or_batch():
    data = torch.zeros(6, 3)
    key = random.key(5)
    grads = per_sample_grads(noisy_loss, has_key=True)(torch.ones(3), data, key=key)
    assert len(grads.unique(dim=0)) == 6
    chunked = per_sample_grads(noisy_loss, has_key=True, chunk_size=4)(torch.ones(3), data, key=key)
    assert grads.equal(chunked)
    longer = per_sample_grads(noisy_loss, has_key=True)(torch.ones(3), torch.zeros(9, 3), key=key)
    assert longer[:6].equal(grads)
    f = clipped_grad(noisy_loss, 1e3, has_key=True, chunk_size=4)
    torch.testing.assert_close(f(torch.ones(3), data, key=key).sum, clip_and_sum(grads, 1e3).sum)
    row = noisy_loss(torch.ones(3), data[2], random.split(key, 6)[2])
    torch.testing.assert_close(row, grads[2].sum())


def test_no_graph_is_kept_and_arguments_are_unchanged():
    params, data = mlp_case(4)
    params = trees.map(lambda p: p.requires_grad_(), params)
    before = trees.map(lambda p: p.detach().clone(), params)
    for result in (
        per_sample_grads(mlp_loss)(params, data),
        clipped_grad(mlp_loss, 1.0)(params, data).sum,
    ):
        assert not any(leaf.requires_grad for leaf in trees.leaves(result))
    assert_trees_close(trees.map(torch.Tensor.detach, params), before, 0, 0)
    assert all(p.grad is None for p in trees.leaves(params))


@pytest.mark.uses_global_generator
def test_dropout_without_a_key_is_an_error_unless_asked_for():
    def loss(w, x):
        return F.dropout(w * x, 0.5).sum()

    data = torch.ones(8, 50)
    with pytest.raises(RuntimeError, match="randomness"):
        per_sample_grads(loss)(torch.ones(50), data)
    different = per_sample_grads(loss, randomness="different")(torch.ones(50), data)
    assert len(different.unique(dim=0)) == 8
    same = per_sample_grads(loss, randomness="same")(torch.ones(50), data)
    assert len(same.unique(dim=0)) == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_formats_of_parameters(dtype):
    params, data = mlp_case(5, dtype=dtype)
    clipped = clipped_grad(mlp_loss, 1.0)(params, data)
    assert clipped.sum["out"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert per_sample_grads(mlp_loss)(params, data)["out"].dtype == dtype


def test_tensor_keywords_are_refused():
    params, data = mlp_case(3)
    for f in (per_sample_grads(mlp_loss), clipped_grad(mlp_loss, 1.0)):
        with pytest.raises(TypeError, match=r"keywords \['labels'\].*vmap does not"):
            f(params, data, labels=torch.zeros(3))


W, X = torch.ones(3), torch.ones(4, 3)


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [
        (lambda: per_sample_grads(lambda w, x: w * x)(W, X), TypeError, r"scalar .* shape \(3,\)"),
        (lambda: per_sample_grads(lambda w, x: 1.0)(W, X), TypeError, "scalar"),
        (
            lambda: per_sample_grads(lambda w, x: (w * x).sum(), has_aux=True)(W, X),
            TypeError,
            "aux",
        ),
        (
            lambda: per_sample_grads(lambda w, x: w @ x)({}, X),
            ValueError,
            "params to hold at least one",
        ),
        (
            lambda: per_sample_grads(lambda w, x: w @ x)(W, ()),
            ValueError,
            "data to hold at least one",
        ),
        (lambda: per_sample_grads(lambda w, x: w @ x)(W.int(), X), TypeError, "int32 at params"),
        (lambda: per_sample_grads(lambda w, x: w @ x)(W, (X, X[:2])), ValueError, "same leading"),
        (lambda: per_sample_grads(lambda w, x: w @ x)(W, (X, 3)), TypeError, r"int at data\[1\]"),
        (lambda: per_sample_grads(noisy_loss, has_key=True)(W, X), ValueError, "Expected key="),
        (lambda: clipped_grad(mlp_loss, 1.0)(W, X, key=random.key(0)), ValueError, "has_key=True"),
        (
            lambda: per_sample_grads(noisy_loss, randomness="yes"),
            ValueError,
            "randomness to be one of",
        ),
        (lambda: clipped_grad(mlp_loss, 1.0, chunk_size=0), ValueError, "chunk_size >= 1"),
        (lambda: clipped_grad(mlp_loss, 1.0, chunk_size=2.5), TypeError, "chunk_size"),
        (
            lambda: clipped_grad(mlp_loss, 1.0, method="ghost"),
            ValueError,
            "method to be one of 'auto'",
        ),
        (lambda: clipped_grad(mlp_loss, -1.0), ValueError, "l2_clip_norm"),
    ],
)
def test_bad_input_is_refused(call, kind, words):
    with pytest.raises(kind, match=words):
        call()


@pytest.mark.parametrize("chunk_size", [None, 4])
def test_compiles_whole_and_equals_eager(chunk_size, fresh_compiler):
    params, data = mlp_case(9)
    f = clipped_grad(mlp_loss, 0.5, chunk_size=chunk_size)
    mask = torch.arange(9) < 7
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    a, b = compiled(params, data, mask=mask), f(params, data, mask=mask)
    assert_trees_close(a.sum, b.sum)
    assert_trees_close(a.norms, b.norms)
