"""The distortion report on cases whose answer is known, and the layer-by-layer trace against the network itself."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.schema import ConfigError, ModelConfig
from eval.distortion import _Report
from model.call import Call
from model.decode.served_params import SERVED
from model.transformer import bind, param_specs
from quant.calibration import ExpertInputs
from quant.distortion import ExpertWeights, kl_by_position, measure
from train.expert_inputs import expert_inputs

rng = np.random.default_rng(0)
GATE_UP = jnp.asarray(rng.normal(size=(1, 4, 8, 2, 16)), jnp.float32)
DOWN = jnp.asarray(rng.normal(size=(1, 4, 16, 8)), jnp.float32)
X = jnp.asarray(rng.normal(size=(6, 8)), jnp.float32)
CHOICE = jnp.array([[0, 1], [1, 0], [0, 2], [2, 1], [0, 1], [3, 3]])
GATES = jnp.array([[0.6, 0.4]] * 5 + [[0.0, 0.0]])


def compare(gate_up=GATE_UP, down=DOWN, choice=CHOICE, kl=(0.0,)):
    mine, theirs = (ExpertInputs(0, X, c, GATES) for c in (CHOICE, choice))
    return measure(ExpertWeights(GATE_UP, DOWN), ExpertWeights(gate_up, down), [mine], [theirs], jnp.array(kl))


def test_nothing_changed_is_nothing_measured():
    found = compare()
    assert [r.tokens for r in found.experts] == [4, 4, 2, 0]
    assert all(r.weight_error == 0 and (r.function_error == 0 or r.tokens == 0) for r in found.experts)
    assert np.isnan(found.experts[3].function_error) and found.summary()["experts_without_tokens"] == 1
    assert (found.routing[0].overlap, found.routing[0].first_choice, found.routing[0].load_kl) == (1, 1, 0)


def test_each_expert_answers_for_itself():
    found = compare(down=DOWN.at[0, 1].mul(1.1))
    errors = [r.function_error for r in found.experts[:3]]
    assert errors == pytest.approx([0, 0.1, 0], abs=1e-5)
    assert found.experts[1].weight_error > 0 == found.experts[0].weight_error


def test_routing_overlap_leaves_padding_out():
    found = compare(choice=CHOICE.at[0].set(jnp.array([0, 3])))
    assert found.routing[0].overlap == pytest.approx((4 + 1 / 3) / 5)
    assert found.routing[0].first_choice == 1 and found.routing[0].load_kl > 0


def test_kl_counts_positions_within_documents():
    logits, other = jnp.zeros((1, 4, 2)), jnp.zeros((1, 4, 2)).at[0, 3, 0].set(jnp.log(3.0))
    kl = kl_by_position(logits, other, jnp.array([[0, 1, 0, 1]]), jnp.array([[True, True, False, True]]))
    by_hand = 0.5 * np.log(0.5 / 0.75) + 0.5 * np.log(0.5 / 0.25)
    np.testing.assert_allclose(kl[:2], [0, by_hand / 2], rtol=1e-6)
    assert np.isnan(kl[2:]).all()


def test_without_held_out_rows_it_is_one_sentence():
    nothing = SimpleNamespace(validation=lambda batches: [])
    with pytest.raises(ConfigError, match="no held-out rows to evaluate on; raise --data.validation-fraction"):
        _Report(SimpleNamespace(cfg=None), nothing, {}, 1)


def test_the_trace_is_the_network():
    cfg = ModelConfig(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=8,
        intermediate_size=32,
        moe_intermediate_size=32,
        n_routed_experts=4,
        num_experts_per_tok=2,
    )
    params = {
        path: jnp.asarray(rng.normal(1.0 if path.endswith("norm") else 0, 0.05, spec.shape), jnp.float32)
        for path, spec in param_specs(cfg).items()
    }
    tokens = jnp.asarray(rng.integers(0, 256, (2, 8)))
    segments = jnp.ones_like(tokens).at[1, 5:].set(0)
    batch = {"tokens": tokens, "positions": jnp.broadcast_to(jnp.arange(8), (2, 8)), "segments": segments}
    traced, logits = expert_inputs(cfg, params, batch, "cpu")
    call = Call(batch["positions"], segments, jnp.float32(0), SERVED, "float32", "cpu")

    @jax.jit
    def forward(params, call):
        network = bind(cfg, params)
        hidden, aux, _ = network(tokens, call)
        return network.logits(hidden, call), aux.moe.expert_counts

    want, expert_counts = forward(params, call)
    # The same operations in another program: XLA may fuse them differently.
    np.testing.assert_allclose(logits, want, atol=1e-5)
    counts = np.zeros((2, 4))
    for entry in traced:
        np.add.at(counts[entry.layer], np.asarray(entry.experts)[np.asarray(segments).reshape(-1) > 0], 1)
    np.testing.assert_array_equal(counts, expert_counts)
    assert not np.asarray(traced[0].gates)[np.asarray(segments).reshape(-1) == 0].any()
