"""Book-keeping: equal to a float64 loop for every layer, bounded where tokens cancel, in one pass."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.func import functional_call
from torch.overrides import handle_torch_function, has_torch_function

from dpfunc import clipped_grad, explain, functional_loss, random, register_rule, trees
from dpfunc.gradients import bookkeeping, layers
from dpfunc.testing import laws

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:There is a performance drop"
    ),  # ops that vmap runs one by one
    pytest.mark.filterwarnings("ignore:Using padding='same'"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated"),  # of torch's compiler
]


def draws(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(shape, generator=generator)


def module_case(module, *inputs, batch=6, seed=0):
    """(loss, params, data) of a module whose output is squared and weighted."""
    draw = draws(seed)
    for parameter in module.parameters():
        parameter.data = draw(*parameter.shape) / math.sqrt(max(parameter.numel() // 8, 1))

    def loss(params, example):
        like = example[0].dtype
        buffers = {n: b.to(like) for n, b in module.named_buffers() if b.is_floating_point()}
        inputs = tuple(x.unsqueeze(0) for x in example)
        out = functional_call(module, {**buffers, **params}, inputs)
        out = out[0] if isinstance(out, tuple) else out
        weights = torch.linspace(-1, 1, out.numel(), dtype=like).reshape(out.shape)
        return (torch.tanh(out) * weights).sum()

    params = {name: p.detach() for name, p in module.named_parameters()}
    return loss, params, tuple(draw(batch, *size) for size in inputs)


def case_linear_forms(p, x):
    h = torch.tanh(x @ p["w1"].T + p["b1"]) + torch.matmul(x, p["w1"].mT)
    h = h + F.linear(x, p["w1"], p["b1"]) + torch.addmm(p["b1"], x, p["w1"].t())
    return (torch.mm(h, p["w2"].t()) * (p["w2"] @ h.T).T).sum()


def case_matrix_times_vector(p, x):
    return (p["w2"] @ torch.tanh(p["w1"] @ x[0] + p["b1"])).square().sum()


def case_slices(p, x):
    first, second = p["w1"].chunk(2)
    return (F.linear(x, first).tanh() * F.linear(x, second)).sum() + p["w2"].sum() + p["b1"].sum()


def case_overlapping_slices(p, x):
    return (F.linear(x, p["w1"][:3]).tanh() * F.linear(x, p["w1"][2:5])).sum()


def case_rule_and_no_rule(p, x):
    return F.linear(x, p["w1"]).square().sum() + torch.einsum("ij,tj->ti", p["w1"], x).tanh().sum()


def case_in_a_list(p, x):
    return torch.stack([F.linear(x, p["w1"]), F.linear(x, p["w1"])]).square().sum() + (
        torch.cat([p["w1"], p["w1"]]).square().sum()
    )


def case_cell_over_time(p, x):
    h = x.new_zeros(5)
    for t in range(x.shape[0]):
        h = torch.tanh(F.linear(x[t], p["w1"][:5], p["b1"][:5]) + F.linear(h, p["u"]))
    return h.square().sum()


def case_no_grad_and_detach(p, x):
    with torch.no_grad():
        h = F.linear(x, p["w1"])
    h = h + F.linear(x, p["w1"]).detach() + F.linear(x, p["w1"].detach())
    return (h * F.linear(x, p["w1"]).tanh()).sum()


def case_inner_vmap(p, x):
    return (
        torch.vmap(lambda row: F.linear(row, p["w1"]).tanh())(x).sum() + F.linear(x, p["w1"]).sum()
    )


def case_inner_grad(p, x):
    return torch.func.grad(lambda x: F.linear(x, p["w1"]).tanh().sum())(x).square().sum()


def case_in_place_after(p, x):
    h = F.linear(x, p["w1"])
    h.mul_(2.0)
    h += p["b1"]
    return F.relu(h, inplace=True).square().sum()


def case_broadcast_parameters(p, x):
    h = (x.unsqueeze(-2) * p["w1"] + p["b1"].unsqueeze(-1)) / (2 + p["w1"].square())
    return (torch.tanh(h) - p["b1"].unsqueeze(-1)).square().sum() + F.prelu(h, p["b1"][:1]).sum()


def case_product_of_parameters(p, x):
    return torch.tanh(x @ (p["w1"].T @ p["w2"].T)).square().sum()


def case_unused(p, x):
    return F.linear(x, p["w1"]).square().sum()


class Doubled(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x, w):
        return 2.0 * F.linear(x, w)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return 2.0 * g @ w, 2.0 * g.T @ x


def case_custom_function(p, x):
    return (Doubled.apply(x, p["w1"]).tanh() * F.linear(x, p["w1"])).sum()


def case_op_by_overload(p, x):
    return torch.ops.aten.linear(x, p["w1"]).tanh().sum() + F.linear(x, p["w1"]).square().sum()


def function_cases():
    draw = draws(1)
    params = {"w1": draw(6, 4), "b1": draw(6), "w2": draw(3, 6), "u": draw(5, 5) / 3}
    data = draw(6, 7, 4)
    for name, function in list(globals().items()):
        if name.startswith("case_"):
            yield name.removeprefix("case_"), (function, params, data)


def token_cases():
    draw = draws(2)
    table = {"e": draw(20, 6), "w": draw(6, 6), "s": draw()}
    tokens = torch.randint(20, (6, 9), generator=torch.Generator().manual_seed(0))
    tokens[:, 3:5] = 2

    def embedding(p, i):
        return (F.embedding(i, p["e"]).tanh() @ p["w"]).square().sum() * p["s"]

    def padded(p, i):
        return (F.embedding(i, p["e"], padding_idx=-18).tanh() @ p["w"]).square().sum()

    def tied(p, i):
        h = torch.tanh(F.embedding(i, p["e"], padding_idx=2) @ p["w"])
        return F.cross_entropy(F.linear(h, p["e"]), i)

    def tied_by_transpose(p, i):
        return F.cross_entropy(torch.tanh(F.embedding(i, p["e"])) @ p["e"].t(), i)

    def bag(p, i):
        return F.embedding_bag(i.unsqueeze(0), p["e"]).square().sum()

    def one_token(p, i):
        return F.embedding(i[0], p["e"]).square().sum()

    for loss in (embedding, padded, tied, tied_by_transpose, bag, one_token):
        yield loss.__name__, (loss, table, tokens)


class Attention(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.inner = nn.MultiheadAttention(8, 2, batch_first=True, **options)

    def forward(self, query, key, value):
        return self.inner(query, key, value, need_weights=False)[0]


MODULES = {
    "linear": (nn.Linear(5, 3), (5,)),
    "linear over two axes": (nn.Linear(5, 3, bias=False), (3, 2, 5)),
    "bilinear": (nn.Bilinear(4, 3, 5), (4,), (3,)),
    "conv1d": (nn.Conv1d(4, 6, 3, padding="same", dilation=2), (4, 11)),
    "conv2d": (nn.Conv2d(3, 4, (3, 2), stride=2, padding=1), (3, 9, 8)),
    "conv2d same, even": (nn.Conv2d(8, 4, 4, padding="same"), (8, 6, 6)),
    "conv2d circular": (nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), (3, 6, 6)),
    "conv2d groups": (nn.Conv2d(4, 6, 3, groups=2, dilation=2), (4, 9, 8)),
    "conv2d depthwise": (nn.Conv2d(8, 8, 3, groups=8, padding=1), (8, 6, 6)),
    "conv2d 1x1": (nn.Conv2d(8, 4, 1, bias=False), (8, 5, 5)),
    "conv2d many channels": (nn.Conv2d(16, 64, 3, padding=1), (16, 2, 2)),
    "conv3d": (nn.Conv3d(2, 3, 2, stride=(1, 2, 1)), (2, 4, 5, 4)),
    "transposed conv1d": (nn.ConvTranspose1d(4, 3, 3, stride=2, output_padding=1), (4, 6)),
    "transposed conv2d": (nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, groups=2, dilation=2), (4, 5, 4)),
    "transposed conv3d": (nn.ConvTranspose3d(2, 3, 2), (2, 3, 3, 3)),
    "layer norm": (nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.PReLU()), (3, 4)),
    "rms norm": (nn.Sequential(nn.Linear(4, 6), nn.RMSNorm(6)), (3, 4)),
    "group norm": (nn.Sequential(nn.Conv2d(3, 6, 3), nn.GroupNorm(2, 6)), (3, 6, 6)),
    "instance norm": (
        nn.Sequential(nn.Conv2d(3, 6, 3), nn.InstanceNorm2d(6, affine=True)),
        (3, 6, 6),
    ),
    "batch norm, frozen": (nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)).eval(), (3, 6, 6)),
    "attention, packed": (Attention(), (5, 8), (5, 8), (5, 8)),
    "attention, separate": (Attention(kdim=3, vdim=4, add_bias_kv=True), (5, 8), (6, 3), (6, 4)),
    "encoder": (nn.TransformerEncoderLayer(8, 2, 12, 0.0, batch_first=True), (5, 8)),
    "lstm": (nn.LSTM(4, 5, num_layers=2, batch_first=True), (6, 4)),
}
CASES = {
    **{name: module_case(*spec) for name, spec in MODULES.items()},
    **dict(function_cases()),
    **dict(token_cases()),
}
UNCOMPILED = {"lstm"}  # the compiler wraps no RNN: write a cell over time


def median_norm(loss, params, data):
    return float(clipped_grad(loss, 1.0, method="vmap")(params, data).norms.median())


@pytest.fixture(params=["chosen", "factors", "per-sample"])
def forced_form(request, monkeypatch):
    """The cost model's choice, and each form whatever it costs."""
    if request.param == "chosen":
        return

    def force(costs):
        wanted = [
            f for f in costs if (f in layers.PER_SAMPLE_FORMS) == (request.param == "per-sample")
        ]
        return (wanted or list(costs))[0]

    monkeypatch.setattr(bookkeeping, "cheapest", force)


def poisoned(data, filler):
    """The data with one example that is not finite, where its format has such numbers."""

    def one(leaf):
        return leaf.index_fill(0, torch.tensor([1]), filler) if leaf.is_floating_point() else leaf

    return trees.map(one, data)


@pytest.mark.parametrize("name", CASES)
def test_equals_a_float64_loop(name, forced_form):
    loss, params, data = CASES[name]
    laws.methods_agree(loss, params, data, median_norm(loss, params, data))


@pytest.mark.parametrize("name", [name for name in CASES if name not in UNCOMPILED])
def test_compiles_whole_and_equals_eager(name, fresh_compiler):
    loss, params, data = CASES[name]
    # The compiler inlines custom Functions, whose ops no plan has: "auto" goes by vmap there.
    method = "auto" if name == "custom_function" else "bookkeeping"
    f = clipped_grad(loss, median_norm(loss, params, data), method=method)
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for examples in (data, poisoned(data, math.nan), poisoned(data, math.inf)):
        pairs = zip(
            f(params, examples).sum.values(), compiled(params, examples).sum.values(), strict=True
        )
        for a, b in pairs:
            assert a.isfinite().all()
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["tied", "conv2d", "encoder"])
def test_inductor_equals_eager(name, fresh_compiler):
    loss, params, data = CASES[name]
    f = clipped_grad(loss, median_norm(loss, params, data), method="bookkeeping")
    eager, compiled = f(params, data), torch.compile(f, fullgraph=True)(params, data)
    for a, b in zip(eager.sum.values(), compiled.sum.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


SERVED = {
    "linear_forms": {"w1", "w2"},
    "matrix_times_vector": {"w1", "w2"},
    "slices": {"w1"},
    "overlapping_slices": set(),
    "rule_and_no_rule": set(),
    "in_a_list": set(),
    "cell_over_time": {"w1", "u"},
    "no_grad_and_detach": {"w1"},
    "inner_vmap": set(),
    "inner_grad": set(),
    "in_place_after": {"w1"},
    "product_of_parameters": {"w1", "w2"},
    "custom_function": set(),
    "op_by_overload": set(),
    "tied": {"e", "w"},
    "tied_by_transpose": {"e"},
    "bag": set(),
    "attention, packed": {"inner.in_proj_weight", "inner.out_proj.weight"},
    "transposed conv2d": {"weight"},
}


@pytest.mark.parametrize("name", SERVED)
def test_a_rule_serves_a_parameter_only_when_it_sees_all_of_it(name):
    loss, params, data = CASES[name]
    paths = explain(loss, params, data).paths
    served = {p.parameter[8:-2] for p in paths if p.ops and not p.reason and p.path != "unused"}
    assert served == SERVED[name]


def per_example_matmuls(f, *args):
    """Matrix products and convolutions in the graph of f, after dead code is gone."""
    counts = []

    def count(graph, inputs):
        names = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
        counts.append(sum(any(op in n for op in ("mm.", "mv.", "convolution")) for n in names))
        return graph.forward

    torch.compile(f, fullgraph=True, backend=aot_autograd(fw_compiler=count))(*args)
    return sum(counts)


@pytest.mark.uses_global_generator
def test_the_graph_of_an_mlp_holds_the_matmuls_of_the_non_private_step(fresh_compiler):
    model = nn.Sequential(
        nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 5)
    )
    loss, params = functional_loss(model, F.cross_entropy)
    data = (torch.zeros(32, 20), torch.zeros(32, dtype=torch.long))

    def mean_loss(params, data):
        return F.cross_entropy(functional_call(model, params, (data[0],)), data[1])

    def non_private(params, data):
        return torch.func.grad(mean_loss)(params, data)

    private = clipped_grad(loss, 1.0, method="bookkeeping")
    plain = per_example_matmuls(non_private, params, data)
    assert plain == 3 + 3 + 2  # forward, weights, inputs
    assert per_example_matmuls(lambda p, d: private(p, d).sum, params, data) == plain


@given(
    scale=st.sampled_from([1e-3, 1.0, 1e3, 1e6]),
    tokens=st.sampled_from([2, 8, 32]),
    tilt=st.sampled_from([0.0, 1e-7, 1e-5, 1e-3]),
    seed=st.integers(0, 100),
    bfloat16=st.booleans(),
)
def test_norms_are_upper_bounds_where_tokens_cancel(scale, tokens, tilt, seed, bfloat16):
    """Half of the tokens undo the other half: Gram products of size 1 for a norm of size tilt."""
    draw = draws(seed)
    x = draw(3, tokens // 2, 6) * scale
    x = torch.cat([x, x * (1 + tilt)], 1)
    g = draw(3, tokens // 2, 5).bfloat16().float()
    g = torch.cat([g, -g], 1)
    exact = torch.einsum("bti,btj->bij", g.double(), x.double()).flatten(1).norm(dim=1)
    index = torch.arange(tokens).remainder(4)

    def linear(params, example):
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            return (F.linear(example[0], params["w"]) * example[1]).sum()

    def conv(params, example):
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            return (F.conv1d(example[0].T, params["w"].unsqueeze(-1)) * example[1].T).sum()

    def embedding(params, example):
        return (F.embedding(index, params["w"]) * example[0]).sum()

    one_hot = F.one_hot(index, 5).double()
    looked_up = torch.einsum("ti,btj->bij", one_hot, x.double()).flatten(1).norm(dim=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            bookkeeping, "cheapest", lambda costs: list(costs)[-1 if "pixels" in costs else 0]
        )
        for loss, norm in ((linear, exact), (conv, exact), (embedding, looked_up)):
            clip = max(float(norm.median()), 1e-6)
            params = {"w": torch.zeros(5, 6)}
            got = clipped_grad(loss, clip, method="bookkeeping")(params, (x, g))
            assert (got.norms >= norm).all()
            factor = torch.clamp(clip / got.norms, max=1.0)
            assert (factor * norm <= clip).all()
            laws.losses_contribution_is_bounded(loss, params, (x, g), clip, method="bookkeeping")


@pytest.mark.parametrize("name", ["linear", "conv2d", "tied", "encoder", "cell_over_time"])
@pytest.mark.parametrize("clip", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("method", ["bookkeeping", "two_pass"])
def test_contributions_are_bounded(name, clip, method, forced_form):
    loss, params, data = CASES[name]
    laws.losses_contribution_is_bounded(loss, params, data, clip, method=method)


@pytest.mark.parametrize("name", ["linear_forms", "conv2d", "encoder", "embedding"])
@pytest.mark.parametrize("method", ["bookkeeping", "two_pass"])
def test_poison_and_padding_vanish(name, method, forced_form):
    loss, params, data = CASES[name]
    clip = median_norm(loss, params, data)
    f = clipped_grad(loss, clip, method=method)
    leaves = list(data) if isinstance(data, tuple) else [data]
    keep = torch.tensor([True, True, False, True, False, True])
    real = f(params, data, mask=keep)
    assert (real.norms[~keep] == 0).all()
    for filler in (math.nan, math.inf, 1e30, 0.0):
        bad = [leaf.clone() for leaf in leaves]
        for leaf in bad:
            if leaf.is_floating_point():
                leaf[~keep] = filler
            else:
                leaf[~keep] = 7
        poisoned = tuple(bad) if isinstance(data, tuple) else bad[0]
        masked = f(params, poisoned, mask=keep).sum
        free = (
            f(params, poisoned).sum
            if not math.isfinite(filler) and bad[0].is_floating_point()
            else masked
        )
        for a, b, c in zip(real.sum.values(), masked.values(), free.values(), strict=True):
            torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(c, a, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["tied", "conv2d", "linear_forms"])
def test_chunks_change_nothing_but_rounding_and_no_example_gives_zeros(name):
    loss, params, data = CASES[name]
    clip = median_norm(loss, params, data)
    whole = clipped_grad(loss, clip, method="bookkeeping")(params, data)
    parts = clipped_grad(loss, clip, method="bookkeeping", chunk_size=4)(params, data)
    torch.testing.assert_close(parts.norms, whole.norms)
    for a, b in zip(whole.sum.values(), parts.sum.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    nothing = tuple(x[:0] for x in data) if isinstance(data, tuple) else data[:0]
    empty = clipped_grad(loss, clip, method="bookkeeping")(params, nothing)
    assert empty.norms.shape == (0,)
    assert all((leaf == 0).all() for leaf in empty.sum.values())


def test_auto_is_bookkeeping_where_a_rule_serves_and_vmap_where_none_does():
    loss, params, data = CASES["linear"]
    same = [clipped_grad(loss, 1.0, method=m)(params, data).norms for m in ("auto", "bookkeeping")]
    assert same[0].equal(same[1])
    loss, params, data = CASES["overlapping_slices"]
    same = [clipped_grad(loss, 1.0, method=m)(params, data).norms for m in ("auto", "vmap")]
    assert same[0].equal(same[1])


@pytest.mark.uses_global_generator
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_formats_of_parameters(dtype):
    model = nn.Sequential(nn.Conv1d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 5))
    loss, params = functional_loss(model.to(dtype), lambda y, t: (y.float() * t.float()).sum())
    draw = draws()
    data = (draw(6, 3, 8).to(dtype), draw(6, 5).to(dtype))
    results = [clipped_grad(loss, 0.5, method=m)(params, data) for m in ("vmap", "bookkeeping")]
    for a, b in zip(*(r.sum.values() for r in results), strict=True):
        assert a.dtype == b.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.02)
    laws.losses_contribution_is_bounded(loss, params, data, 0.5, method="bookkeeping")


@pytest.mark.uses_global_generator
def test_dropout_from_a_key_is_that_of_the_vmap_method():
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3))
    loss, params = functional_loss(model, F.mse_loss, has_key=True)
    data, key = (draws()(6, 4), draws(1)(6, 3)), random.key(0)
    a, b = (
        clipped_grad(loss, 1.0, method=m, has_key=True)(params, data, key=key).sum
        for m in ("vmap", "bookkeeping")
    )
    for x, y in zip(a.values(), b.values(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["encoder", "tied", "conv2d", "unused", "no_grad_and_detach"])
def test_two_passes_give_what_one_gives(name, forced_form):
    loss, params, data = CASES[name]
    one, two = (
        clipped_grad(loss, 1e6, method=m)(params, data) for m in ("bookkeeping", "two_pass")
    )
    torch.testing.assert_close(one.norms, two.norms, rtol=2e-4, atol=0)
    for a, b in zip(one.sum.values(), two.sum.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_an_l1_rule_takes_the_gradients_themselves():
    class Lasso:
        sensitivity, order = 1.0, 1

        def scales(self, norms):
            total = sum(norms.values())
            return {name: torch.clamp(1.0 / total, max=1.0) for name in norms}

    loss, params, data = CASES["linear over two axes"]
    a, b = (clipped_grad(loss, Lasso(), method=m)(params, data) for m in ("vmap", "bookkeeping"))
    torch.testing.assert_close(a.norms, b.norms, rtol=1e-5, atol=0)
    torch.testing.assert_close(a.sum["weight"], b.sum["weight"], rtol=1e-4, atol=1e-6)


def test_maps_over_parameters():
    loss, params, data = CASES["conv2d"]
    many = {name: torch.stack([p, 2 * p]) for name, p in params.items()}
    f = clipped_grad(loss, 1.0, method="bookkeeping")
    mapped = torch.vmap(lambda p: f(p, data).sum)(many)
    for i in range(2):
        alone = f({name: p[i] for name, p in many.items()}, data).sum
        for name, leaf in alone.items():
            torch.testing.assert_close(mapped[name][i], leaf, rtol=1e-4, atol=1e-6)


def test_nested_params_keep_their_order_when_compiled(fresh_compiler):
    def loss(p, x):
        h = torch.tanh(F.linear(x, p["z"]["w"], p["z"]["a"]))
        return F.linear(h, p["b"][0], p["b"][1]).square().sum()

    draw = draws()
    params = {"z": {"w": draw(4, 3), "a": draw(4)}, "b": (draw(2, 4), draw(2))}
    data = draw(5, 3)
    f = clipped_grad(loss, 0.5, method="bookkeeping")
    a, b = (
        f(params, data).sum,
        torch.compile(f, fullgraph=True, backend="aot_eager")(params, data).sum,
    )
    torch.testing.assert_close(a, b)
    laws.methods_agree(loss, params, data, 0.5)


def test_a_loss_that_changes_is_planned_afresh_or_refused():
    state = {"times": 1, "flips": False}

    def loss(p, x):
        state["times"] = 3 - state["times"] if state["flips"] else state["times"]
        for _ in range(state["times"]):
            x = F.linear(x, p["w"])
        return x.square().sum()

    params, data = {"w": draws()(3, 3)}, draws(1)(4, 3)
    f = clipped_grad(loss, 1.0, method="bookkeeping")
    f(params, data)
    state["times"] = 2
    expected = clipped_grad(loss, 1.0, method="vmap")(params, data)
    torch.testing.assert_close(f(params, data).norms, expected.norms, rtol=1e-4, atol=0)
    state["flips"] = True
    with pytest.raises(RuntimeError, match="abstract run"):
        f(params, data)


def test_explain_is_a_table():
    loss, params, data = CASES["rule_and_no_rule"]
    table = str(explain(loss, params, data)).splitlines()
    assert table[0].split() == ["parameter", "shape", "ops", "path", "MFLOP", "MB"]
    assert "linear, einsum" in table[3]
    assert "has no rule" in table[3]
    loss, params, data = CASES["linear"]
    paths = {p.parameter: p for p in explain(loss, params, data).paths}
    assert paths["params['weight']"].path == "factors"
    assert paths["params['weight']"].flops == 2 * 6 * 5 * 3


def scale_rows(x, w, power):
    if has_torch_function((x, w)):
        return handle_torch_function(scale_rows, (x, w), x, w, power)
    return x**power * w


def test_a_users_own_rule():
    def squared_norm(inputs, output_grads, power):
        return (inputs[0] ** power * output_grads).sum(1).square().sum(1)

    def weighted_sum(inputs, output_grads, scale, power):
        return torch.einsum("b,btn,btn->n", scale, inputs[0] ** power, output_grads)

    def loss(p, x):
        return scale_rows(x, p["w"], 2).tanh().sum()

    params, data = {"w": draws()(5)}, draws(1)(6, 4, 5)
    clip = median_norm(loss, params, data)
    op = scale_rows
    register_rule(op, parameter=1, squared_norm=squared_norm, weighted_sum=weighted_sum)
    try:
        assert explain(loss, params, data).paths[0].path == "factors"
        laws.methods_agree(loss, params, data, clip)
        data[2] = math.nan
        assert clipped_grad(loss, clip)(params, data).sum["w"].isfinite().all()
    finally:
        del layers.RULES[op]
    with pytest.raises(ValueError, match="has one"):
        register_rule(F.linear, parameter=1, squared_norm=squared_norm, weighted_sum=weighted_sum)
    with pytest.raises(TypeError, match="squared_norm"):
        register_rule(op, parameter=1, squared_norm=3, weighted_sum=weighted_sum)


class Branching(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


class Checkpointed(nn.Module):
    def forward(self, x):
        return torch.utils.checkpoint.checkpoint(torch.tanh, x, use_reentrant=False)


BUFFER = torch.zeros(3)


def changes_a_buffer(p, x):
    BUFFER.add_(x.detach().sum())
    return F.linear(x, p["w"]).sum()


def batch_statistics(p, x):
    return F.batch_norm(F.linear(x, p["w"]), None, None, training=True).sum()


def through(module):
    whole = nn.Sequential(nn.Linear(3, 3), nn.Sequential(module))
    return lambda p, x: functional_call(
        whole, {"0.weight": p["w"], "0.bias": torch.zeros(3)}, (x,), strict=False
    ).sum()


REFUSED = {
    "a batch": (lambda p, x: F.linear(x, p["w"]), TypeError, "scalar"),
    "a branch": (through(Branching()), RuntimeError, r"module '1.0' \(Branching\).*torch.where"),
    "a buffer": (changes_a_buffer, RuntimeError, "in-place.*has_aux"),
    "batch norm": (through(nn.BatchNorm1d(3)), RuntimeError, r"'1.0' \(BatchNorm1d\).*eval"),
    "batch statistics": (batch_statistics, ValueError, "GroupNorm"),
    "a draw": (through(nn.Dropout(0.5)), RuntimeError, r"'1.0' \(Dropout\).*has_key=True"),
    "a checkpoint": (through(Checkpointed()), RuntimeError, r"\(Checkpointed\).*chunk_size"),
    "no parameter": (lambda p, x: x.sum(), ValueError, "uses none of them"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("method", ["auto", "bookkeeping"])
def test_what_cannot_be_private_is_refused_with_the_way_out(name, method):
    loss, kind, words = REFUSED[name]
    with pytest.raises(kind, match=words):
        clipped_grad(loss, 1.0, method=method)({"w": draws()(3, 3)}, draws(1)(4, 2, 3))
    assert (BUFFER == 0).all()


class Reversed(torch.autograd.Function):
    """A view forward and something else backward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(w):
        return w.view_as(w)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, g):
        return -0.5 * g


def reversed_weight(p, x):
    return F.linear(x, Reversed.apply(p["w"])).tanh().sum()


def hooked_view(p, x):
    view = p["w"].view_as(p["w"])
    view.register_hook(lambda g: 3 * g)
    return F.linear(x, view).tanh().sum()


def hooked_leaf(p, x):
    if p["w"].requires_grad:
        p["w"].register_hook(lambda g: 3 * g)
    return F.linear(x, p["w"]).tanh().sum()


def negative_view(p, x):
    pairs = torch.view_as_complex(p["w"].unflatten(-1, (2, 2))).conj().imag
    return F.linear(x[:, :2], pairs).tanh().sum()


def cast_that_casts_nothing(p, x):
    return F.linear(x, p["w"].float().to(x.dtype).contiguous()).tanh().sum()


def keywords(p, x):
    return (torch.mm(x, mat2=p["w"].T) * F.linear(input=x, weight=p["w"])).tanh().sum()


def reads_a_constant(p, x):
    threshold, mask = torch.tensor(2.0), torch.tensor([True, False, True, True])
    y = F.linear(x, p["w"]) if threshold.item() > 1 else x
    return y.tanh().sum() + x[:, mask].sum() * p["w"].sum()


def branches_on_a_parameter(p, x):
    return F.linear(x, p["w"] if p["gain"] > 0 else -p["w"]).tanh().sum() * p["gain"]


ODD = {
    f.__name__: f
    for f in (
        reversed_weight,
        hooked_view,
        hooked_leaf,
        negative_view,
        cast_that_casts_nothing,
        keywords,
        reads_a_constant,
        branches_on_a_parameter,
    )
}


@pytest.mark.parametrize("name", ODD)
def test_odd_losses_agree_with_vmap(name):
    draw = draws()
    params, x = {"w": draw(5, 4), "gain": torch.tensor(2.0)}, draw(6, 7, 4)
    expected = clipped_grad(ODD[name], 1.0, method="vmap")(params, x)
    # Two passes map parameters without rules, so that a branch on one is a branch in vmap.
    for method in ("auto", "two_pass")[: 1 if name == "branches_on_a_parameter" else 2]:
        got = clipped_grad(ODD[name], 1.0, method=method)(params, x)
        torch.testing.assert_close(got.norms, expected.norms, rtol=2e-4, atol=0)
        torch.testing.assert_close(got.sum["w"], expected.sum["w"], rtol=2e-4, atol=1e-5)


def test_parameters_of_any_layout():
    draw = draws()
    flat = draw(40)
    conv = draw(4, 3, 2, 2).to(memory_format=torch.channels_last)
    params = {
        "a": flat[:20].view(4, 5).T,
        "b": flat[20:].view(5, 4),
        "c": draw(6, 1).expand(6, 5),
        "k": conv,
    }

    def loss(p, x):
        h = torch.tanh(F.linear(x[:, :4], p["a"].contiguous()) + F.linear(x[:, :4], p["b"]))
        first, second = p["c"].chunk(2)
        image = x.reshape(3, 4, 1).expand(3, 4, 4)
        return (F.linear(h, first) * F.linear(h, second)).sum() + F.conv2d(
            image, p["k"]
        ).square().sum()

    data = draw(6, 3, 4)
    laws.methods_agree(loss, params, data, 1.0)


STATE: dict = {}


def weight_decay_switched_on(p, x):
    return F.linear(x, p["w"]).tanh().sum() + (p["w"].square().sum() if STATE["late"] else 0.0)


def another_slice(p, x):
    begin = 2 if STATE["late"] else 0
    return F.linear(x, p["w"][begin : begin + 3]).tanh().sum()


def another_parameter(p, x):
    return (x @ p["v" if STATE["late"] else "w"].T).tanh().sum()


def thawed(p, x):
    v = p["v"] if STATE["late"] else p["v"].detach()
    return (F.linear(x, p["w"]) * F.linear(x, v)).tanh().sum()


def another_scale(p, x):
    return torch.addmm(p["w"][:, 0], x, p["w"].T, alpha=2 if STATE["late"] else 1).tanh().sum()


@pytest.mark.parametrize(
    "loss", [weight_decay_switched_on, another_slice, another_parameter, thawed, another_scale]
)
def test_an_old_plan_never_serves_a_loss_that_changed(loss):
    draw = draws()
    params, x = {"w": draw(5, 4), "v": draw(5, 4)}, draw(6, 7, 4)
    f = clipped_grad(loss, 1.0)
    STATE["late"] = False
    f(params, x)
    STATE["late"] = True
    expected, got = clipped_grad(loss, 1.0, method="vmap")(params, x), f(params, x)
    torch.testing.assert_close(got.norms, expected.norms, rtol=2e-4, atol=0)
    for name, leaf in expected.sum.items():
        torch.testing.assert_close(got.sum[name], leaf, rtol=2e-4, atol=1e-5)


class Lazy(nn.Module):
    """Builds a table when it is first called, as rotary embeddings do."""

    def __init__(self):
        super().__init__()
        self.inner, self.table = nn.Linear(4, 4), None

    def forward(self, x):
        if self.table is None:
            self.table = torch.arange(4.0).cos()
        return self.inner(x) * self.table


@pytest.mark.uses_global_generator
def test_the_abstract_run_leaves_real_tensors_behind():
    module = Lazy()
    loss, params = functional_loss(module, F.mse_loss)
    data = (draws()(5, 4), draws(1)(5, 4))
    explain(loss, params, data)
    got = clipped_grad(loss, 1.0)(params, data)
    assert type(module.table) is type(got.sum["inner.weight"]) is torch.Tensor
    assert module.table.equal(torch.arange(4.0).cos())
    laws.methods_agree(without_cache(module), params, data, 1.0)


def without_cache(module):
    def loss(params, example):
        x, y = example
        out = functional_call(module.inner, {n[6:]: p for n, p in params.items()}, (x,))
        return F.mse_loss(out * module.table.to(x.dtype), y)

    return loss


def test_a_loss_with_a_random_state_of_its_own_stays_within_the_bound_in_two_passes():
    calls = []

    def restless(p, x):
        calls.append(None)
        return F.linear(x, p["w"]).square().sum() * 10.0 ** len(calls)

    params, x = {"w": draws()(5, 4)}, draws(1)(1, 7, 4)
    for _ in range(4):
        calls.append(None)
        total = clipped_grad(restless, 1.0, method="two_pass")(params, x).sum
        assert laws.exact_norm(total) <= 1.0


def test_dropout_at_random_takes_one_pass_and_stays_within_the_bound():
    def loss(p, x):
        return F.dropout(F.linear(x, p["w"]), 0.9).square().sum()

    params, x = {"w": draws()(5, 4)}, draws(1)(1, 7, 4)
    before = torch.get_rng_state()
    for method in ("two_pass", "bookkeeping"):
        total = clipped_grad(loss, 1.0, method=method, randomness="different")(params, x).sum
        assert laws.exact_norm(total) <= 1.0
    torch.set_rng_state(before)


class Normalised:
    """Every gradient to the sensitivity, however small it was: scales far above 1."""

    order = 2

    def __init__(self, sensitivity):
        self.sensitivity = sensitivity

    def scales(self, norms):
        return {name: self.sensitivity / norm for name, norm in norms.items()}


@pytest.mark.parametrize("sensitivity", [1e-20, 1.0, 3.8e23, 1e30])
@pytest.mark.parametrize("conv", [False, True])
def test_scales_above_one_overflow_no_single_token(sensitivity, conv, monkeypatch):
    monkeypatch.setattr(bookkeeping, "cheapest", lambda costs: list(costs)[-1 if conv else 0])
    g = torch.stack([torch.full((8,), 1.05e18), torch.full((8,), -0.95e18)])[None]
    c = torch.full((1, 2, 16), 1e-15)

    def loss(p, example):
        if conv:
            return (F.conv1d(example[0].T, p["w"].unsqueeze(-1)) * example[1].T).sum()
        return (F.linear(example[0], p["w"]) * example[1]).sum()

    for factors in ((c, g), (c * 1e-20, g), (c * 1e30, g), (c, g * 1e18)):
        f = clipped_grad(loss, Normalised(sensitivity), method="bookkeeping")
        total = f({"w": torch.zeros(8, 16)}, factors).sum
        assert laws.exact_norm(total) <= sensitivity


def test_a_sequence_of_many_lengths_compiles(fresh_compiler):
    params = {"w": draws()(5, 4)}
    f = clipped_grad(lambda p, x: F.linear(x, p["w"]).tanh().sum(), 1.0)
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for tokens in (7, 6, 5):
        x = draws(1)(6, tokens, 4)
        torch.testing.assert_close(compiled(params, x).sum["w"], f(params, x).sum["w"])


def test_a_users_own_rule_with_keywords():
    def op(x, w, a=1.0, b=2.0):
        if has_torch_function((x, w)):
            return handle_torch_function(op, (x, w), x, w, b=b, a=a)
        return x * w * a + b

    def squared_norm(inputs, output_grads, a, b):
        assert (a, b) == (3.0, 2.0)
        return (a * inputs[0] * output_grads).sum(1).square().sum(1)

    def weighted_sum(inputs, output_grads, scale, a, b):
        return a * torch.einsum("b,btn,btn->n", scale, inputs[0], output_grads)

    register_rule(op, parameter=1, squared_norm=squared_norm, weighted_sum=weighted_sum)
    try:
        laws.methods_agree(
            lambda p, x: op(x, p["w"], a=3.0).tanh().sum(),
            {"w": draws()(5)},
            draws(1)(6, 4, 5),
            1.0,
        )
    finally:
        del layers.RULES[op]
