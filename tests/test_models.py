"""Modules as pure losses: names, ties, partitions, keyed dropout, and what is refused."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dpfunc import clipped_grad, functional_loss, per_sample_grads, random
from dpfunc.models.functional import _attention

pytestmark = pytest.mark.uses_global_generator  # nn's own initialisation


def example(num=4, features=6):
    return torch.linspace(-1, 1, num * features).reshape(num, features), torch.arange(num) % 3


def test_the_loss_is_the_modules_loss_on_a_batch_of_one():
    module = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    loss, params = functional_loss(module, F.cross_entropy)
    x, y = example()
    for i in range(4):
        torch.testing.assert_close(
            loss(params, (x[i], y[i])), F.cross_entropy(module(x[i : i + 1]), y[i : i + 1])
        )


def test_parameters_are_detached_copies():
    module = nn.Linear(2, 2)
    _, params = functional_loss(module, F.mse_loss)
    assert not any(p.requires_grad for p in params.values())
    with torch.no_grad():
        module.weight.zero_()
    assert params["weight"].abs().sum() > 0


@pytest.mark.parametrize("names", [[], ["weight"], ["weight", "bias", "more"], ["weight", "Bias"]])
def test_parameters_with_other_names_are_refused(names):
    loss, params = functional_loss(nn.Linear(6, 3), F.cross_entropy)
    wrong = dict.fromkeys(names, params["weight"])
    x, y = example()
    with pytest.raises(ValueError, match=r"names \['bias', 'weight'\]"):
        loss(wrong, (x[0], y[0]))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.head(self.embedding(tokens)).mean(1)


def test_a_tied_tensor_is_one_parameter_owned_by_its_first_name():
    module = Tied()
    loss, params = functional_loss(module, F.cross_entropy)
    assert list(params) == ["embedding.weight"]
    tokens, y = torch.tensor([[1, 2, 2], [0, 4, 1]]), torch.tensor([1, 3])
    grads = per_sample_grads(loss)(params, (tokens, y))["embedding.weight"]
    for i in range(2):
        module.zero_grad()
        F.cross_entropy(module(tokens[i : i + 1]), y[i : i + 1]).backward()
        torch.testing.assert_close(grads[i], module.embedding.weight.grad)


def test_frozen_parameters_and_buffers_stay_inside():
    module = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))
    module[0].requires_grad_(False)
    loss, params = functional_loss(module, F.cross_entropy)
    assert sorted(params) == ["1.bias", "1.weight"]
    _, chosen = functional_loss(
        module, F.cross_entropy, trainable=lambda name: name.endswith("bias")
    )
    assert sorted(chosen) == ["0.bias", "1.bias"]
    assert set(per_sample_grads(loss)(params, example())) == set(params)
    module[1].requires_grad_(False)
    with pytest.raises(ValueError, match="at least one trainable"):
        functional_loss(module, F.cross_entropy)


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, a, b):
        return self.left(a) - self.right(b)


def test_several_inputs_by_position_or_by_name():
    loss, params = functional_loss(TwoInputs(), F.cross_entropy)
    x, y = example()
    by_position = per_sample_grads(loss)(params, ((x, 2 * x), y))
    by_name = per_sample_grads(loss)(params, ({"b": 2 * x, "a": x}, y))
    torch.testing.assert_close(by_position, by_name)


@pytest.mark.parametrize(
    "layer", [nn.Dropout(0.5), nn.Dropout1d(0.5), nn.Dropout2d(0.5), nn.Dropout3d(0.5)]
)
def test_keyed_dropout_differs_per_example_and_drops_its_share(layer):
    spatial = {"Dropout": 2, "Dropout1d": 1, "Dropout2d": 2, "Dropout3d": 3}[type(layer).__name__]
    module = nn.Sequential(nn.Identity(), layer)
    shape = (40,) + (3,) * spatial

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.ones(shape))

        def forward(self, x):
            return module(self.gain * x)

    loss, params = functional_loss(Scaled(), lambda out, _: out.sum(), has_key=True)
    data = (torch.ones(64, *shape), torch.zeros(64))
    f = per_sample_grads(loss, has_key=True)
    kept = f(params, data, key=random.key(0))["gain"]
    assert kept.unique().tolist() == [0.0, 2.0]
    assert len(kept.flatten(1).unique(dim=0)) == 64
    assert 0.45 < (kept > 0).double().mean() < 0.55
    if type(layer) is not nn.Dropout:
        flat = kept.flatten(2)
        assert (flat == flat[..., :1]).all()  # whole channels
    assert f(params, data, key=random.key(0))["gain"].equal(kept)
    assert not f(params, data, key=random.key(1))["gain"].equal(kept)


def test_two_dropout_layers_draw_apart_and_eval_draws_nothing():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.ones(2, 500))

        def forward(self, x):
            return torch.stack([F.dropout(g * x, 0.5, self.training) for g in self.gain])

    module = Twice()
    loss, params = functional_loss(module, lambda out, _: out.sum(), has_key=True)
    data = (torch.ones(1, 500), torch.zeros(1))
    first, second = per_sample_grads(loss, has_key=True)(params, data, key=random.key(0))["gain"][0]
    agree = (first == second).double().mean()
    assert 0.4 < agree < 0.6
    module.eval()
    kept = per_sample_grads(loss, has_key=True)(params, data, key=random.key(0))["gain"]
    assert (kept == 1).all()


def test_dropout_that_no_key_reaches_is_an_error_with_a_way_out():
    module = nn.Sequential(nn.Linear(6, 3), nn.AlphaDropout(0.5))
    loss, params = functional_loss(module, F.cross_entropy, has_key=True)
    with pytest.raises(RuntimeError, match=r"in module '1' .AlphaDropout.*has_key=True"):
        clipped_grad(loss, 1.0, has_key=True)(params, example(), key=random.key(0))


@pytest.mark.uses_global_generator
@pytest.mark.parametrize("need_weights", [False, True])
def test_dropout_inside_attention_is_drawn_from_the_key(need_weights):
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.MultiheadAttention(4, 2, dropout=0.5, batch_first=True)

        def forward(self, x):
            return self.inner(x, x, x, need_weights=need_weights)[0]

    loss, params = functional_loss(Attention(), F.mse_loss, has_key=True)
    data = (torch.ones(2, 3, 4), torch.zeros(2, 3, 4))

    def norms(seed, method):
        f = clipped_grad(loss, 1.0, has_key=True, method=method)
        return f(params, data, key=random.key(seed)).norms

    assert norms(0, "auto").equal(norms(0, "auto"))
    torch.testing.assert_close(norms(0, "auto"), norms(0, "vmap"), rtol=1e-4, atol=0)
    assert not norms(0, "auto").allclose(norms(1, "auto"), rtol=1e-3)
    first, second = norms(0, "auto")
    assert abs(first - second) > 1e-3 * first  # alike examples, different masks


@pytest.mark.parametrize(
    "options",
    [{}, {"is_causal": True}, {"attn_mask": "bool"}, {"attn_mask": "float", "scale": 0.3}],
)
def test_attention_in_the_open_is_torchs(options):
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 2, n, 4, generator=draw) for n in (5, 6, 6))
    if "attn_mask" in options:
        mask = torch.randn(5, 6, generator=draw)
        options = {**options, "attn_mask": mask > -1 if options["attn_mask"] == "bool" else mask}
    expected = F.scaled_dot_product_attention(q, k, v, **options)
    torch.testing.assert_close(_attention(q, k, v, **options), expected)


def test_dropout_without_a_key_is_an_error_with_a_way_out():
    module = nn.Sequential(nn.Linear(6, 3), nn.Dropout(0.5))
    loss, params = functional_loss(module, F.cross_entropy)
    with pytest.raises(RuntimeError, match=r"functional_loss\(\.\.\., has_key=True\)"):
        clipped_grad(loss, 1.0)(params, example())


def test_calls_of_the_wrong_form_are_told():
    x, y = example()
    loss, params = functional_loss(nn.Linear(6, 3), F.cross_entropy)
    keyed, _ = functional_loss(nn.Linear(6, 3), F.cross_entropy, has_key=True)
    for call, words in [
        (
            lambda: loss(list(params.values()), (x[0], y[0])),
            "params to be a dict by name, got list",
        ),
        (lambda: loss(params, {"x": x[0], "y": y[0]}), r"example \(input, target\), got dict"),
        (lambda: keyed(params, (x[0], y[0])), "a key for a loss"),
        (lambda: loss(params, (x[0], y[0]), random.key(0)), "no key for a loss"),
        (lambda: clipped_grad((loss, params), 1.0), "loss to be a function, got tuple"),
    ]:
        with pytest.raises(TypeError, match=words):
            call()
    wrong, params = functional_loss(
        nn.Sequential(nn.Linear(6, 3)),
        lambda out, y: F.cross_entropy(out, y),
        has_key=True,
    )
    assert wrong(params, (x[0], y[0]), random.key(0)).ndim == 0


@pytest.mark.parametrize(
    "layer", [nn.BatchNorm1d(6), nn.BatchNorm1d(6, track_running_stats=False).eval()]
)
def test_batch_statistics_are_refused_with_the_path_and_the_way_out(layer):
    with pytest.raises(ValueError, match=r"BatchNorm1d at '0' .*GroupNorm.*eval"):
        functional_loss(nn.Sequential(layer, nn.Linear(6, 3)), F.cross_entropy)


def test_a_frozen_batch_norm_is_harmless():
    module = nn.Sequential(nn.BatchNorm1d(6).eval(), nn.Linear(6, 3))
    loss, params = functional_loss(module, F.cross_entropy)
    assert clipped_grad(loss, 1.0)(params, example()).norms.shape == (4,)
