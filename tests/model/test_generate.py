"""Decoding equals the teacher-forced forward pass; samplers; stops; streaming; the cache's size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.schema import ConfigError
from model import generate
from model.generate import Program, Stats, bucket, decode, generate_batch, prefill, stream
from model.sampling import Sampling, choose, kept
from model.served_params import SERVED, serve
from model.transformer import bind, param_specs
from quant.served import Serving
from tests.model.networks import EXACT, call_for, random_params, small

CFG = small(n_group=2, topk_group=1, yarn_factor=4.0, hidden_size=64, moe_intermediate_size=32)
INT4 = Serving("bfloat16", "int4", 32)
PROMPTS = [np.random.default_rng(n).integers(0, 96, n).tolist() for n in (5, 18, 1)]
COMMON = dict(serving=EXACT, amount=0, dtype="float32", platform="cpu")


@pytest.fixture(scope="module")
def params():
    return random_params(CFG, std=0.2, bias=0.1)


@pytest.mark.parametrize("q_lora_rank", [16, None])
def test_decode_equals_teacher_forcing(q_lora_rank):
    """Logits at every position of rows of three lengths, through the absorbed form and the latent cache."""
    cfg = small(q_lora_rank=q_lora_rank, yarn_factor=4.0)
    params = random_params(cfg, std=0.2, bias=0.1)
    tokens = np.random.default_rng(0).integers(0, 96, (3, 14)).astype(np.int32)
    lengths = np.array([9, 2, 6], np.int32)
    network, call = bind(cfg, params), call_for(tokens)
    want = np.asarray(network.logits(network(tokens, call)[0], call))
    program = Program(cfg, "float32", "cpu", True)
    logits, cache = prefill(params, jnp.asarray(tokens), jnp.asarray(lengths), 20, program)
    assert cache.shape == (cfg.num_hidden_layers, 3, 20, cfg.kv_lora_rank + cfg.qk_rope_head_dim)
    step = jax.jit(decode, static_argnames="program")
    for n in range(5):
        mine, other = np.asarray(logits), want[np.arange(3), lengths + n - 1]
        assert np.abs(mine - other).max() <= 1e-5 * np.abs(want).max()  # float32 sums in another order
        logits, cache = step(params, tokens[np.arange(3), lengths + n], cache, lengths + n, program=program)


def test_batch_stream_and_single_rows_agree(params):
    out = generate_batch(CFG, params, PROMPTS, max_new_tokens=9, stop_ids=(), **COMMON)
    assert [len(row) for row in out] == [9, 9, 9]
    for prompt, row in zip(PROMPTS, out, strict=True):
        assert generate_batch(CFG, params, [prompt], max_new_tokens=9, stop_ids=(), **COMMON) == [row]
    stats = Stats()
    assert list(stream(CFG, params, PROMPTS[1], max_new_tokens=9, stop_ids=(), stats=stats, **COMMON)) == out[1]
    assert (stats.prompt_tokens, stats.new_tokens) == (18, 9)
    assert 0 < stats.first_token_s < stats.total_s and stats.tokens_per_s > 0


def test_stop_tokens_end_a_row_and_are_returned(params):
    free = generate_batch(CFG, params, PROMPTS, max_new_tokens=9, stop_ids=(), **COMMON)
    stop = free[0][3]
    out = generate_batch(CFG, params, PROMPTS, max_new_tokens=9, stop_ids=(stop,), **COMMON)
    for row, full in zip(out, free, strict=True):
        assert row == (full[:full.index(stop) + 1] if stop in full else full)
    assert list(stream(CFG, params, PROMPTS[0], max_new_tokens=9, stop_ids=(stop,), **COMMON)) == out[0]


def test_prepared_weights_give_the_same_tokens_and_logits():
    """Served once or on the fly, in both compute dtypes, on the grid and off it."""
    params = random_params(CFG, std=0.2, bias=0.1)
    tokens = np.asarray([PROMPTS[1]], np.int32)

    @jax.jit
    def forward(weights, call):
        network = bind(CFG, weights)
        return network.logits(network(tokens, call)[0], call)

    for dtype in ("float32", "bfloat16"):
        for amount in (0.0, 1.0):
            logits = []
            ready = serve(params, param_specs(CFG), INT4, amount, dtype)
            for weights, serving in ((params, INT4), (ready, SERVED)):
                call = call_for(tokens, serving=serving, amount=amount, dtype=dtype)
                logits.append(np.asarray(forward(weights, call)))
            np.testing.assert_array_equal(*logits)
            assert ready["moe.mlp.router_bias"].dtype == jnp.float32
            assert ready["moe.mlp.experts_down"].dtype == dtype


def test_same_shapes_compile_once(params):
    generate_batch(CFG, params, PROMPTS, max_new_tokens=9, stop_ids=(), **COMMON)
    before = generate._generate._cache_size()
    generate_batch(CFG, params, [p + [1] for p in PROMPTS], max_new_tokens=7, stop_ids=(), **COMMON)
    assert generate._generate._cache_size() == before


def test_seeds_and_rows(params):
    """A seed fixes the text; another seed changes it; a row's text does not depend on the rows after it."""
    sampled = dict(max_new_tokens=9, stop_ids=(), temperature=1.0, **COMMON)
    first = generate_batch(CFG, params, PROMPTS, seed=3, **sampled)
    assert first == generate_batch(CFG, params, PROMPTS, seed=3, **sampled)
    assert first != generate_batch(CFG, params, PROMPTS, seed=4, **sampled)
    assert first[:2] == generate_batch(CFG, params, PROMPTS[:2], seed=3, **sampled)


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


@pytest.mark.parametrize("change, message", [
    (dict(prompts=[[]]), "prompt 0 is empty"), (dict(prompts=[[96]]), "token id outside"),
    (dict(max_new_tokens=0), "max_new_tokens"), (dict(temperature=-1.0), "temperature"), (dict(top_p=0.0), "top_p")])
def test_bad_input_is_one_sentence(params, change, message):
    with pytest.raises(ConfigError, match=message):
        generate_batch(CFG, params, **dict(dict(prompts=PROMPTS, max_new_tokens=4, stop_ids=()) | COMMON | change))


def test_buckets_are_few_and_close():
    sizes = {bucket(n, 16) for n in range(1, 1025)}
    assert len(sizes) <= 20
    assert all(n <= bucket(n, 16) <= max(16 * -(-n // 16), 1.25 * n + 1) for n in range(1, 1025))
