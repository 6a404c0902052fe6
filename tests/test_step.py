"""The step: Algorithm 1 end to end, pure, compiled whole, mapped, and no word drawn twice."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dpfunc import (
    DPSGD,
    Batch,
    ClipFraction,
    StepEvent,
    append,
    clip_and_noise,
    fit,
    functional_loss,
    in_place,
    make_dp_step,
    make_train_step,
    optimizers,
    per_sample_grads,
    poisson_batches,
    private_grad,
    random,
    trees,
)
from dpfunc._chacha20 import cpu
from dpfunc.testing import laws

KEY = random.key(99)
MECHANISM = DPSGD(clipping=0.5, noise_multiplier=1.2, sampling_prob=0.25, expected_batch_size=256)


def loss(params, example):
    x, y = example
    return F.cross_entropy(torch.tanh(x @ params["w"]) @ params["v"] + params["b"], y)


def case(num=1024):
    g = torch.Generator().manual_seed(0)
    params = {
        "w": torch.randn(20, 8, generator=g),
        "v": torch.randn(8, 3, generator=g),
        "b": torch.zeros(3),
    }
    data = (torch.randn(num, 20, generator=g), torch.randint(0, 3, (num,), generator=g))
    return params, data


def descend(params, grads):
    return trees.map(lambda p, g: p - 0.5 * g, params, grads)


def one_batch(step=0):
    _, data = case(64)
    return Batch(data, torch.arange(64) < 50, torch.tensor(step))


def test_a_step_is_clip_and_noise_on_per_sample_gradients():
    params, _ = case()
    batch = one_batch(step=4)
    noisy = private_grad(loss, MECHANISM)(params, batch, KEY)
    grads = per_sample_grads(loss)(params, batch.data)
    expected = clip_and_noise(
        grads, random.derive(KEY, random.NOISE, 4), MECHANISM, mask=batch.mask
    )
    torch.testing.assert_close(noisy, expected)
    stepped, event = make_dp_step(loss, MECHANISM, descend)(params, batch, KEY)
    torch.testing.assert_close(stepped, descend(params, noisy))
    assert event == StepEvent(noise_multiplier=1.2, sampling_prob=0.25)


def test_the_same_arguments_give_the_same_bits_and_are_unchanged():
    laws.is_pure(make_dp_step(loss, MECHANISM, descend), case()[0], one_batch(), KEY.clone())


def test_every_step_leaf_key_and_rank_has_noise_of_its_own():
    laws.noise_is_fresh(private_grad(loss, MECHANISM), case()[0], one_batch(), KEY)


def test_an_empty_and_an_all_padding_batch_release_noise_alone():
    laws.empty_batch_is_noise(private_grad(loss, MECHANISM), case()[0], one_batch(), KEY)


def test_no_example_moves_the_release_by_more_than_its_share():
    gradient = private_grad(loss, MECHANISM)
    laws.released_neighbours_are_close(gradient, case()[0], one_batch(), KEY, MECHANISM)
    laws.release_is_the_mean(gradient, loss, case()[0], one_batch(), KEY, MECHANISM)


def test_chunks_change_nothing_but_rounding():
    params, _ = case()
    whole = private_grad(loss, MECHANISM)(params, one_batch(), KEY)
    parts = private_grad(loss, MECHANISM, chunk_size=7)(params, one_batch(), KEY)
    torch.testing.assert_close(whole, parts)


def test_28_poisson_sizes_make_at_most_4_graphs_and_compiled_equals_eager(fresh_compiler):
    params, data = case()
    dp_step = make_dp_step(loss, MECHANISM, descend)
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(dp_step, fullgraph=True, backend=counting)
    sizes = set()
    for batch in poisson_batches(data, KEY, MECHANISM, num_steps=200):
        sizes.add(int(batch.mask.sum()))
        expected, event = dp_step(params, batch, KEY)
        got, same_event = compiled(params, batch, KEY)
        assert event == same_event
        torch.testing.assert_close(got, expected)
        params = expected
        if len(sizes) == 28:
            break
    assert len(sizes) == 28
    assert len(graphs) <= 4


def cnn():
    module = nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.GroupNorm(2, 4),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Flatten(),
        nn.Linear(144, 3),
    )
    data = (torch.linspace(-1, 1, 16 * 64).reshape(16, 1, 8, 8), torch.arange(16) % 3)
    return module, Batch(data, torch.arange(16) < 13, torch.tensor(2))


@pytest.mark.uses_global_generator  # nn's own initialisation
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_whole_training_step_of_a_cnn_with_dropout_compiles_to_one_graph(backend, fresh_compiler):
    module, batch = cnn()
    keyed_loss, params = functional_loss(module, F.cross_entropy, has_key=True)
    init, step = make_train_step(keyed_loss, MECHANISM, optimizers.adam(0.1), has_key=True)
    state = init(params)
    expected, event = step(state, batch, KEY)
    got, same_event = torch.compile(step, fullgraph=True, backend=backend)(state, batch, KEY)
    assert event == same_event
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_vmap_over_keys_returns_parameters_and_the_event():
    params, _ = case()
    dp_step = make_dp_step(loss, MECHANISM, descend)
    keys = random.split(KEY, 3)
    mapped, event = torch.vmap(dp_step, (None, None, 0))(params, one_batch(), keys)
    assert event == MECHANISM.event()
    for i in range(3):
        torch.testing.assert_close(
            {n: p[i] for n, p in mapped.items()}, dp_step(params, one_batch(), keys[i])[0]
        )


def test_vmap_over_keys_parameters_and_noise_multipliers():
    params, _ = case()
    stacked = trees.map(lambda p: torch.stack([p, 2 * p, -p]), params)
    keys, noise = random.split(KEY, 3), torch.tensor([0.0, 1.0, 5.0])

    dp_step = make_dp_step(loss, MECHANISM, descend)
    mapped, event = torch.vmap(dp_step, (0, None, 0, 0))(stacked, one_batch(), keys, noise)
    for i in range(3):
        completed = event.complete(noise_multiplier=float(noise[i]))
        mechanism = replace(MECHANISM, noise_multiplier=float(noise[i]))
        row = {n: p[i] for n, p in stacked.items()}
        expected, same_event = make_dp_step(loss, mechanism, descend)(row, one_batch(), keys[i])
        torch.testing.assert_close({n: p[i] for n, p in mapped.items()}, expected)
        assert completed == same_event
    with pytest.raises(TypeError, match="complete"):
        append((), event)


def test_a_noise_multiplier_that_changes_does_not_recompile(fresh_compiler):
    params, _ = case()
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph

    dp_step = make_dp_step(loss, MECHANISM, descend)
    compiled = torch.compile(dp_step, fullgraph=True, backend=counting)
    for noise in (0.5, 1.0, 2.0):
        arguments = (params, one_batch(), KEY, torch.tensor(noise))
        torch.testing.assert_close(compiled(*arguments)[0], dp_step(*arguments)[0])
    assert len(graphs) == 1


@pytest.mark.uses_global_generator  # nn's own initialisation
def test_one_run_key_passed_to_everything_never_draws_a_word_twice(monkeypatch):
    """Every block of keystream that a run asks for, by (key, nonce, block): each is asked for once.

    Keys that the step derives are themselves drawn words; deriving the same key again (the run key
    is folded anew at each step) reads the same block for the same purpose, so a block may come
    again only as the very same derivation, which is told by its nonce tag.
    """
    seen = Counter()
    make = cpu._encryptor

    def spying(key, nonce, block):
        encryptor = make(key, nonce, block)
        name = (key, nonce)

        class Spy:
            at = block

            def update_into(self, zeros, out):
                for _ in range(-(-len(zeros) // 64)):
                    seen[(*name, self.at)] += 1
                    self.at += 1
                return encryptor.update_into(zeros, out)

        return Spy()

    monkeypatch.setattr(cpu, "_encryptor", spying)
    module, _ = cnn()
    keyed_loss, params = functional_loss(module, F.cross_entropy, has_key=True)
    asked = ClipFraction(noise_multiplier=3.0, name=next(iter(params)))  # also a parameter's name
    mechanism = replace(MECHANISM, telemetry=(asked,))
    init, step = make_train_step(keyed_loss, mechanism, optimizers.sgd(0.5), has_key=True)
    state, data = init(params), (torch.zeros(40, 1, 8, 8), torch.zeros(40, dtype=torch.int64))
    for batch in poisson_batches(data, KEY, mechanism, num_steps=4, pad_to_multiple_of=4):
        state, _ = step(state, batch, KEY)
    streams = {name: n for name, n in seen.items() if name[1] == bytes(12)}
    derivations = {name: n for name, n in seen.items() if name[1] != bytes(12)}
    assert len(streams) > 4 * (len(params) + 16)  # noise of each leaf, dropout of each example
    assert max(streams.values()) == 1
    assert max(derivations.values()) == 1
    tags = Counter(int.from_bytes(nonce[:4], "little") for _, nonce, _ in derivations)
    assert set(tags) == {
        1,
        random.SAMPLING,
        random.NOISE,
        random.LEAF,
        random.LOSS,
        random.DROPOUT,
        random.TELEMETRY,
    }


def test_a_train_step_equals_the_step_with_plain_descent():
    params, _ = case()
    init, step = make_train_step(loss, MECHANISM, optimizers.sgd(0.5))
    state, event = step(init(params), one_batch(), KEY)
    torch.testing.assert_close(
        state.params, make_dp_step(loss, MECHANISM, descend)(params, one_batch(), KEY)[0]
    )
    assert event == MECHANISM.event()


def test_half_precision_parameters_stay_in_their_format():
    params = trees.map(torch.Tensor.bfloat16, case()[0])
    batch = one_batch()
    batch = batch._replace(data=(batch.data[0].bfloat16(), batch.data[1]))
    init, step = make_train_step(loss, MECHANISM, optimizers.sgd(0.5, momentum=0.9))
    state, _ = step(init(params), batch, KEY)
    assert all(p.dtype == torch.bfloat16 for p in state.params.values())
    assert all(v.dtype == torch.float32 for v in state.optimizer.velocity.values())


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_a_rule_without_a_usable_sensitivity_is_refused(bad):
    class Rule:
        sensitivity, order = bad, 2

        def scales(self, norms):
            return norms

    with pytest.raises(ValueError, match="sensitivity"):
        replace(MECHANISM, clipping=Rule())


def test_keys_show_in_no_record():
    words = {str(w) for w in KEY.tolist()}
    init, _ = make_train_step(loss, MECHANISM, optimizers.sgd(0.5, momentum=0.9))
    shown = repr(MECHANISM) + repr(MECHANISM.event()) + repr(one_batch()) + repr(init(case()[0]))
    assert not any(word in shown for word in words)


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [
        (
            lambda f, p: f(p, tuple(one_batch()), KEY),
            TypeError,
            r"dpfunc.Batch\(data, mask, step\), got tuple",
        ),
        (lambda f, p: f(p, one_batch(), 7), ValueError, "key to be an integer tensor"),
        (lambda f, p: f(p, one_batch(), KEY, 1.0), TypeError, "number goes into the mechanism"),
        (lambda f, p: f(p, one_batch(), KEY, torch.ones(2)), ValueError, "0-d tensor, got shape"),
        (lambda f, p: f({}, one_batch(), KEY), ValueError, "params"),
        (lambda f, p: private_grad(loss, MECHANISM, has_aux=True), TypeError, "has_aux"),
    ],
)
def test_bad_input_is_refused(call, kind, words):
    with pytest.raises(kind, match=words):
        call(private_grad(loss, MECHANISM), case()[0])


def test_no_graph_grows_over_steps():
    laws.keeps_no_graph(make_dp_step(loss, MECHANISM, descend), case()[0], one_batch(), KEY)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda p: make_dp_step(loss, descend, MECHANISM), "DPSGD, got function.*in order"),
        (
            lambda p: make_dp_step(loss, MECHANISM, lambda p, g: None)(p, one_batch(), KEY),
            "got None",
        ),
        (lambda p: make_train_step(loss, MECHANISM, optimizers.sgd), "such as sgd"),
        (lambda p: make_train_step(loss, MECHANISM, torch.optim.SGD), r"\(init, update\) pair"),
        (
            lambda p: make_train_step(loss, MECHANISM, optimizers.sgd(0.1))[1](p, one_batch(), KEY),
            "state to be what init",
        ),
        (
            lambda p: private_grad(loss, MECHANISM)(p, one_batch()._replace(step=None), KEY),
            r"batch\.step to be a 0-d int tensor",
        ),
    ],
)
def test_arguments_of_the_wrong_kind_are_told(call, words):
    with pytest.raises(TypeError, match=words):
        call(case()[0])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_step_on_the_device_equals_the_step_on_the_host():
    params, _ = case()
    expected, _ = make_dp_step(loss, MECHANISM, descend)(params, one_batch(), KEY)
    there = trees.map(lambda leaf: leaf.cuda(), (params, one_batch()))
    for key in (KEY, KEY.cuda()):
        got, _ = make_dp_step(loss, MECHANISM, descend)(*there, key)
        torch.testing.assert_close(trees.map(torch.Tensor.cpu, got), expected, rtol=1e-4, atol=1e-5)


class TestInPlace:
    """A step that writes over the state it is given."""

    def remembering(self):
        """An optimizer whose state is made of the parameters themselves, twice over."""

        def update(grads, state, params):
            return trees.map(lambda g: -0.5 * g, grads), {"last": params, "before": state["last"]}

        return optimizers.Optimizer(lambda params: {"last": params, "before": params}, update)

    def batches(self):
        _, data = case(64)
        return list(poisson_batches(data, KEY, MECHANISM, num_steps=3))

    @pytest.mark.parametrize("compiled", [False, True])
    @pytest.mark.parametrize("name", ["adamw", "remembering", "averaged", "disk"])
    def test_the_numbers_are_those_of_the_pure_step(self, name, compiled, fresh_compiler):
        optimizer = {
            "adamw": lambda: optimizers.adamw(0.1),
            "remembering": self.remembering,
            "averaged": lambda: optimizers.averaged(optimizers.sgd(0.1), decay=0.9),
            "disk": lambda: optimizers.disk(optimizers.sgd(0.1), gain=0.5),
        }[name]()
        mechanism = replace(MECHANISM, telemetry=(ClipFraction(noise_multiplier=5.0),))
        pair = make_train_step(loss, mechanism, optimizer)
        init, step = in_place(pair)
        run = torch.compile(step, fullgraph=True, backend="aot_eager") if compiled else step
        params, _ = case()
        pure, state = pair[0](params), init(params)
        for batch in self.batches():
            pure, event = pair[1](pure, batch, KEY)
            memory = [leaf.data_ptr() for leaf in trees.leaves(state)]
            after, event_here = run(state, batch, KEY)
            assert [leaf.data_ptr() for leaf in trees.leaves(after)] == memory
            assert event_here == event
            for a, b in zip(trees.leaves(after), trees.leaves(pure), strict=True):
                if compiled:
                    torch.testing.assert_close(a, b)
                else:
                    assert a.equal(b)
            state = after

    def test_what_init_was_given_stays_as_it_was(self):
        params, _ = case()
        before = trees.map(torch.clone, params)
        init, step = in_place(make_train_step(loss, MECHANISM, self.remembering()))
        state = init(params)
        leaves = trees.leaves(state)
        assert len({leaf.untyped_storage().data_ptr() for leaf in leaves}) == len(leaves)
        step(state, one_batch(), KEY)
        assert all(params[name].equal(before[name]) for name in before)

    def test_a_run_by_train_and_by_fit_is_the_run_of_the_pure_step(self):
        params, data = case(64)
        pair = make_train_step(loss, MECHANISM, optimizers.adam(0.1))
        options = {"data": data, "mechanism": MECHANISM, "key": KEY, "num_steps": 4}
        runs = [
            fit(p, params, delta=1e-5, progress=False, **options) for p in (pair, in_place(pair))
        ]
        for a, b in zip(*(trees.leaves(r.state) for r in runs), strict=True):
            assert a.equal(b)
        assert runs[0].log == runs[1].log

    def test_a_leaf_that_changes_is_refused(self):
        wider = optimizers.Optimizer(
            lambda params: torch.zeros(2),
            lambda grads, state, params: (trees.map(torch.zeros_like, grads), state.double()),
        )
        init, step = in_place(make_train_step(loss, MECHANISM, wider))
        with pytest.raises(ValueError, match="shape and dtype of every leaf"):
            step(init(case()[0]), one_batch(), KEY)

    @pytest.mark.parametrize("given", [make_dp_step(loss, MECHANISM, descend), (1, 2), None])
    def test_what_is_no_pair_is_refused(self, given):
        with pytest.raises(TypeError, match=r"\(init, step\)"):
            in_place(given)
