"""Decoding equals the teacher-forced forward pass; samplers; stops; streaming; the cache's size."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.schema import ConfigError
from model import latent_cache
from model.decode import generate
from model.decode.generate import Decoder, Program, Stats, bucket, extend, prefill, room_for, shared_prefix, tokens_per_s
from model.decode.sampling import OUTSIDE, Budget, Sampling, choose, kept, spend
from model.decode.served_params import SERVED, serve
from model.kernels import grouped_matmul_decode, grouped_matmul_row
from model.latent_cache import BLOCK
from model.transformer import bind, param_specs
from quant.served import Serving
from tests.model.networks import EXACT, call_for, generate_batch, random_params, small, step_by_step, wide

CFG = small(n_group=2, topk_group=1, yarn_factor=4.0, hidden_size=64, moe_intermediate_size=32)
INT4 = Serving("bfloat16", "int4", 32)
PROMPTS = [np.random.default_rng(n).integers(0, 96, n).tolist() for n in (5, 18, 1)]
COMMON = dict(serving=EXACT, amount=0, dtype="float32", platform="cpu")


def decoder(params, rows=1, **settings):
    return Decoder(CFG, params, rows, **dict(stop_ids=(), dtype="float32", platform="cpu") | settings)


@partial(jax.jit, static_argnames="cfg")
def forward(cfg, params, call, tokens):
    """Logits as in training."""
    network = bind(cfg, params)
    return network.logits(network(tokens, call)[0], call)


@pytest.fixture(scope="module")
def params():
    return random_params(CFG, std=0.2, bias=0.1)


@pytest.mark.parametrize("rows, kernel", [(1, grouped_matmul_row), (20, grouped_matmul_decode)])
@pytest.mark.parametrize("packed", [False, True])
def test_decoding_by_kernels(monkeypatch, packed, rows, kernel):
    """As on a Hopper GPU, its kernels interpreted: experts of single rows or of small blocks, picked from those of all layers,
    and for one token all but the narrowest matrices, where they lie, give the logits of the plain entry, up to roundings to
    bfloat16 of sums in another order."""
    cfg, params = wide(packed)
    calls, run = [], kernel.rows
    monkeypatch.setattr(kernel, "rows", lambda x, w, e: calls.append(len(w)) or run(x, w, e, interpret=True))
    plain, mine = (step_by_step(cfg, params, rows, platform) for platform in ("cpu", "hopper"))
    layers, experts = cfg.num_moe_layers, cfg.num_moe_layers * cfg.n_routed_experts
    assert calls.count(experts) >= 2 and (layers in calls) == (rows == 1) and set(calls) <= {layers, experts}
    assert np.abs(mine - plain).max() <= 2e-2 * np.abs(plain).max()


@pytest.mark.parametrize("q_lora_rank", [16, None])
def test_decode_equals_teacher_forcing(q_lora_rank):
    """Logits at every position of rows of three lengths, through the absorbed form and the latent cache: first one
    token a row, then several with padding in front."""
    cfg = small(q_lora_rank=q_lora_rank, yarn_factor=4.0)
    params = random_params(cfg, std=0.2, bias=0.1)
    tokens = np.random.default_rng(0).integers(0, 96, (3, 24)).astype(np.int32)
    lengths, rows = np.array([9, 2, 6], np.int32), np.arange(3)
    want = np.asarray(forward(cfg, params, call_for(tokens), tokens))
    close = 1e-5 * np.abs(want).max()  # float32 sums in another order
    program = Program(cfg, "float32", "cpu", True)
    logits, cache = generate._prefill(params, jnp.asarray(tokens[:, :14]), jnp.asarray(lengths), 32, program)
    assert cache.shape == (cfg.num_hidden_layers, 3, 32, cfg.kv_lora_rank + cfg.qk_rope_head_dim)
    step = jax.jit(extend, static_argnames="program")
    for n in range(5):
        assert np.abs(np.asarray(logits) - want[rows, lengths + n - 1]).max() <= close
        logits, cache = step(params, tokens[rows, lengths + n][:, None], cache, (lengths + n)[:, None], program=program)
    more, at = np.array([3, 8, 1]), lengths + 5
    several, positions = np.zeros((3, 8), np.int32), np.full((3, 8), 32)
    for row in rows:
        several[row, 8 - more[row] :] = tokens[row, at[row] : at[row] + more[row]]
        positions[row, 8 - more[row] :] = np.arange(at[row], at[row] + more[row])
    logits, cache = step(params, several, cache, positions, program=program)
    assert np.abs(np.asarray(logits) - want[rows, at + more - 1]).max() <= close


def test_blocks_of_the_cache_change_nothing(params, monkeypatch):
    """Logits of a row that reaches over three blocks of the cache, and of a short row beside it."""
    monkeypatch.setattr(latent_cache, "BLOCK", 16)
    tokens = np.random.default_rng(0).integers(0, 96, (2, 41)).astype(np.int32)
    want = np.asarray(forward(CFG, params, call_for(tokens), tokens))
    program = Program(CFG, "float32", "cpu", True)
    read = jax.jit(lambda *arrays: prefill(*arrays, 64, program))  # functions of their own: jit knows nothing of BLOCK
    go_on = jax.jit(lambda *arrays: extend(*arrays, program))
    _, cache = read(params, jnp.asarray(tokens[:, :40]), jnp.array([40, 3]))
    logits, _ = go_on(params, tokens[[0, 1], [40, 3]][:, None], cache, jnp.array([[40], [3]]))
    assert np.abs(np.asarray(logits) - want[[0, 1], [40, 3]]).max() <= 1e-5 * np.abs(want).max()


def test_the_cache_is_written_where_it_lies(params):
    """The compiled step's output cache is its input's memory, and its scratch memory does not grow with the cache."""
    program, scratch = Program(CFG, "float32", "cpu", True), []
    weights = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    integer = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)  # noqa: E731
    for blocks in (2, 16):
        cache = jax.ShapeDtypeStruct(
            (CFG.num_hidden_layers, 4, blocks * BLOCK, CFG.kv_lora_rank + CFG.qk_rope_head_dim), jnp.float32
        )
        logits = jax.ShapeDtypeStruct((4, CFG.vocab_size), jnp.float32)
        for lowered in (
            generate._extend.lower(weights, integer(4, 1), cache, integer(4, 1), program),
            generate._loop.lower(
                weights, logits, cache, integer(4), integer(4), integer(1), Sampling(), Budget(), room=16, program=program
            ),
        ):
            memory = lowered.compile().memory_analysis()
            assert memory.alias_size_in_bytes >= cache.size * 4
            scratch.append(memory.temp_size_in_bytes)
    assert scratch[:2] == scratch[2:]


def test_batch_stream_and_single_rows_agree(params):
    out = generate_batch(CFG, params, PROMPTS, max_new_tokens=9, stop_ids=(), **COMMON)
    assert [len(row) for row in out] == [9, 9, 9]
    for prompt, row in zip(PROMPTS, out, strict=True):
        assert generate_batch(CFG, params, [prompt], max_new_tokens=9, stop_ids=(), **COMMON) == [row]
    stats = Stats()
    assert list(decoder(params).stream(PROMPTS[1], 9, stats=stats)) == out[1]
    assert (stats.prompt_tokens, stats.read_tokens, stats.new_tokens) == (18, 18, 9)
    assert 0 < stats.first_token_s < stats.second_token_s < stats.total_s and tokens_per_s(stats) > 0
    assert tokens_per_s(stats, stats) == pytest.approx(tokens_per_s(stats)) and np.isnan(tokens_per_s(Stats(new_tokens=2)))


def test_a_conversation_goes_on_in_its_cache(params):
    """Rounds in which rows drop out, come back, or had their history rewritten: as if every prompt were new."""
    talk, prompts = decoder(params, rows=3), {row: list(prompt) for row, prompt in enumerate(PROMPTS)}
    for rows, rewritten in (([0, 1, 2], None), ([0, 2], None), ([0, 1, 2], 1)):
        if rewritten is not None:
            prompts[rewritten][3] += 1
        asked = {row: list(prompts[row]) for row in rows}
        fresh = decoder(params, rows=3).reply(asked, 9)
        assert talk.reply(asked, 9) == fresh
        for row, ids in fresh.items():
            prompts[row] += [*ids, 7, 8, 9]
    stats, alone = Stats(), decoder(params)
    again = [*PROMPTS[0], *alone.stream(PROMPTS[0], 5), 1, 2]
    assert list(alone.stream(again, 5, stats=stats)) == decoder(params).reply({0: again}, 5)[0]
    assert stats.read_tokens == 2, "the five new ones were cached while they were generated"


def test_a_stream_leaves_other_rows_alone(params):
    talk, longer = decoder(params, rows=2), list(PROMPTS[1])
    longer += talk.reply({1: longer}, 9)[1] + [7]
    assert list(talk.stream([5, 6], 9)) == decoder(params).reply({0: [5, 6]}, 9)[0]
    assert talk.reply({1: longer}, 9) == decoder(params, rows=2).reply({1: longer}, 9)


def test_sizes():
    assert [room_for(n) for n in (1, 16, 17, BLOCK, BLOCK + 1, 10 * BLOCK + 1)] == [16, 16, 32, BLOCK, 2 * BLOCK, 12 * BLOCK]
    assert all(room_for(n) >= n for n in range(1, 4000))
    assert [shared_prefix([1, 2, 3], other) for other in ([], [1], [1, 2, 4], [1, 2, 3, 4], [2])] == [0, 1, 2, 3, 0]


def test_a_budget_ends_thoughts(params):
    """Token 5 begins thoughts, and 6 ends them or a call section with 7: after 4 tokens of thought the end is put in, on the
    device and streamed."""
    budget = Budget(begin=5, end=6, calls=7, tokens=4)
    for given, want in (
        ([1, 5, 2, 3, 2, 2, 2, 2, 5, 6, 2], [1, 5, 2, 3, 2, 2, 6, 2, 5, 6, 2]),
        ([5, 2, 3, 7, 20, 21, 22, 23], [5, 2, 3, 7, 20, 21, 22, 23]),
        ([5, 2, 3, 4, 2, 7, 20, 21], [5, 2, 3, 4, 2, 7, 20, 21]),
        ([7, 5, 2, 2, 2, 2, 2], [7, 5, 2, 2, 2, 2, 6]),
        ([5, 2, 2, 2, 6, 20, 5, 2, 2, 2, 20], [5, 2, 2, 2, 6, 20, 5, 2, 6, 2, 20]),  # a second thought has what the first left
        ([5, 5, 2, 2, 2, 2, 2], [5, 5, 2, 2, 2, 2, 6]),
    ):
        seen, state = [], jnp.full(1, OUTSIDE)
        for token in given:
            token, state = spend(budget, state, jnp.array([token]))
            seen.append(int(token[0]))
        assert seen == want
    free = decoder(params).reply({0: PROMPTS[1]}, 12)[0]
    budget = Budget(begin=free[1], end=95, tokens=3)
    cut = decoder(params).reply({0: PROMPTS[1]}, 12, budget)[0]
    assert cut[:2] == free[:2] and cut[5] == 95 and cut[2:5] == free[2:5]
    assert list(decoder(params).stream(PROMPTS[1], 12, budget)) == cut


def test_stop_tokens_end_a_row_and_are_returned(params):
    free = generate_batch(CFG, params, PROMPTS, max_new_tokens=9, stop_ids=(), **COMMON)
    stop = free[0][3]
    out = generate_batch(CFG, params, PROMPTS, max_new_tokens=9, stop_ids=(stop,), **COMMON)
    for row, full in zip(out, free, strict=True):
        assert row == (full[: full.index(stop) + 1] if stop in full else full)
    assert list(decoder(params, stop_ids=(stop,)).stream(PROMPTS[0], 9)) == out[0]


def test_prepared_weights_give_the_same_tokens_and_logits():
    """Served once or on the fly, in both compute dtypes, on the grid and off it."""
    params = random_params(CFG, std=0.2, bias=0.1)
    tokens = np.asarray([PROMPTS[1]], np.int32)

    for dtype in ("float32", "bfloat16"):
        for amount in (0.0, 1.0):
            logits = []
            ready = serve(params, param_specs(CFG), INT4, amount, dtype)
            for weights, serving in ((params, INT4), (ready, SERVED)):
                call = call_for(tokens, serving=serving, amount=amount, dtype=dtype)
                logits.append(np.asarray(forward(CFG, weights, call, tokens)))
            np.testing.assert_array_equal(*logits)
            assert ready["moe.mlp.router_bias"].dtype == jnp.float32
            assert ready["moe.mlp.experts_down"].dtype == dtype


def test_same_shapes_compile_once(params):
    generate_batch(CFG, params, PROMPTS, max_new_tokens=9, stop_ids=(), **COMMON)
    before = generate._loop._cache_size()
    generate_batch(CFG, params, [p + [1] for p in PROMPTS], max_new_tokens=7, stop_ids=(), **COMMON)
    assert generate._loop._cache_size() == before


def test_ids_without_a_token_are_never_chosen(params):
    """Greedy and drawn: the network has room for more ids than the tokenizer knows."""
    for sampling in (Sampling(), Sampling(temperature=5.0)):
        replies = decoder(params, 3, vocab_size=7, sampling=sampling).reply(dict(enumerate(PROMPTS)), 20)
        assert max(map(max, replies.values())) < 7, sampling
        streamed = list(decoder(params, vocab_size=7, sampling=sampling).stream(PROMPTS[0], 20))
        assert max(streamed) < 7
    assert max(map(max, decoder(params, 3, sampling=Sampling(temperature=5.0)).reply(dict(enumerate(PROMPTS)), 20).values())) > 6


def test_seeds_and_rows(params):
    """A seed fixes the text; another seed changes it; a row's text does not depend on the rows after it."""

    def sampled(prompts, seed):
        return generate_batch(CFG, params, prompts, max_new_tokens=9, stop_ids=(), sampling=Sampling(1.0, seed=seed), **COMMON)

    first = sampled(PROMPTS, 3)
    assert first == sampled(PROMPTS, 3) != sampled(PROMPTS, 4)
    assert first[:2] == sampled(PROMPTS[:2], 3)


def test_nucleus_and_min_p():
    probs = np.array([[0.4, 0.05, 0.3, 0.2, 0.05]])
    logits = jnp.log(jnp.asarray(probs, jnp.float32))

    def survivors(**how):
        return np.flatnonzero(np.isfinite(np.asarray(kept(logits, Sampling(temperature=1.0, **how)))[0])).tolist()

    assert survivors() == [0, 1, 2, 3, 4]
    assert survivors(top_p=0.5) == [0, 2]  # 0.4 alone is less than 0.5
    assert survivors(top_p=0.01) == [0]
    assert survivors(min_p=0.45) == [0, 2, 3]
    assert survivors(min_p=1.0) == [0]


def test_samples_follow_the_probabilities():
    """20,000 draws: each frequency within four standard errors (0.014) of the tempered probability."""
    logits = jnp.log(jnp.asarray([0.5, 0.3, 0.2]))
    drawn = choose(jnp.broadcast_to(logits, (20000, 3)), jnp.zeros(20000, jnp.int32), Sampling(temperature=0.5), False)
    want = np.array([0.25, 0.09, 0.04]) / 0.38
    np.testing.assert_allclose(np.bincount(np.asarray(drawn), minlength=3) / 20000, want, atol=0.014)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(prompts=[[]]), "prompt 0 is empty"),
        (dict(prompts=[[96]]), "token id outside"),
        (dict(max_new_tokens=0), "max_new_tokens"),
        (dict(sampling=Sampling(temperature=-1.0)), "temperature"),
        (dict(sampling=Sampling(top_p=0.0)), "top_p"),
    ],
)
def test_bad_input_is_one_sentence(params, change, message):
    with pytest.raises(ConfigError, match=message):
        generate_batch(CFG, params, **dict(dict(prompts=PROMPTS, max_new_tokens=4, stop_ids=()) | COMMON | change))


def test_buckets_are_few_and_close():
    sizes = {bucket(n, 16) for n in range(1, 1025)}
    assert len(sizes) <= 20
    assert all(n <= bucket(n, 16) <= max(16 * -(-n // 16), 1.25 * n + 1) for n in range(1, 1025))
