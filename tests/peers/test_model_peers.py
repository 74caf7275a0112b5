"""Our network against transformers' `deepseek_v3` in float32, over a covering set of the family's configurations.

Every pair of choices of two settings appears in some case (a greedy covering of the grid's 8,064 cases).
Weights go through real files, so that names and layouts are tested with the mathematics.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from transformers import DeepseekV3ForCausalLM

from configs.schema import ModelConfig, QuantConfig
from model import cross_entropy, router
from model.transformer import bind, param_specs
from quant.hf_config import write_config
from quant.layout import all_slots
from tests.model.networks import EXACT, call_for, generate_batch, random_params, small

TOLERANCE = 1e-5
"""Largest difference of logits over the largest logit. The same mathematics in two orders of float32 sums differs by
1e-6 to 2e-6 here (transformers in float32 is that far from itself in float64)."""

MARGIN = 1e-4
"""Routing choices closer than this may fall either way in float32."""

GRID = {
    "q_lora_rank": (16, None),
    "yarn": ((1.0, 32.0), (32.0, 1.0), (32.0, 32.0), (40.0, 1.0), (40.0, 32.0), (64.0, 1.0), (64.0, 32.0)),
    "mscale": ((1.0, 1.0), (1.0, 0.0), (0.707, 0.707)),
    "groups": ((1, 1), (4, 2)),
    "bias": (0.0, 0.2),
    "dense": (0, 1, 3),
    "n_shared_experts": (1, 2),
    "norm_topk_prob": (True, False),
    "rms_norm_eps": (1e-5, 1e-6),
    "left_out": (False, True),
}


def covering(grid: dict[str, tuple]) -> list[dict]:
    """Cases in which every pair of values of any two settings occurs; greedy over random candidates, seeded."""
    rng = np.random.default_rng(0)
    names = list(grid)
    missing = {
        ((a, i), (b, j)) for a, b in itertools.combinations(names, 2) for i in range(len(grid[a])) for j in range(len(grid[b]))
    }
    cases = []

    def new_pairs(case):
        return missing & set(itertools.combinations(case.items(), 2))

    while missing:
        candidates = [{n: int(rng.integers(len(grid[n]))) for n in names} for _ in range(200)]
        # Start every fourth candidate from a pair that is still missing, so that the search always ends.
        for k, candidate in enumerate(candidates[::4]):
            candidate.update(dict(sorted(missing)[k % len(missing)]))
        best = max(candidates, key=lambda c: len(new_pairs(c)))
        missing -= new_pairs(best)
        cases.append({n: grid[n][i] for n, i in best.items()})
    return cases


def config_of(case: dict) -> ModelConfig:
    factor, beta = case["yarn"]
    groups, kept = case["groups"]
    return small(
        q_lora_rank=case["q_lora_rank"],
        yarn_factor=factor,
        yarn_beta_fast=beta,
        rope_theta=10000.0,
        qk_rope_head_dim=16,
        yarn_mscale=case["mscale"][0],
        yarn_mscale_all_dim=case["mscale"][1],
        n_group=groups,
        topk_group=kept,
        num_hidden_layers=case["dense"] + 2,
        first_k_dense_replace=case["dense"],
        n_shared_experts=case["n_shared_experts"],
        norm_topk_prob=case["norm_topk_prob"],
        rms_norm_eps=case["rms_norm_eps"],
        routed_scaling_factor=1.7,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )


def weights_of(cfg: ModelConfig, bias: float, seed: int) -> dict[str, jax.Array]:
    """Random weights whose two latents are small, so that the epsilon inside their norms matters."""
    params = random_params(cfg, std=0.15, bias=bias, seed=seed)
    for path in params:
        if path.endswith("q_a"):
            params[path] = params[path] * 0.02
        elif path.endswith("kv_a"):
            params[path] = params[path].at[..., : cfg.kv_lora_rank].multiply(0.02)
    return params


def transformers_twin(cfg: ModelConfig, params: dict[str, jax.Array], folder) -> DeepseekV3ForCausalLM:
    """The same weights in transformers, through files."""
    arrays = {path: np.asarray(x) for path, x in params.items()}
    tensors = {slot.name: np.ascontiguousarray(slot.to_hf(arrays[slot.path][slot.block])) for slot in all_slots(param_specs(cfg))}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(write_config(cfg, QuantConfig(grid="none"))))
    return read_by_transformers(folder)


def read_by_transformers(folder) -> DeepseekV3ForCausalLM:
    """In float32; a missing or unexpected key is a failure."""
    model, report = DeepseekV3ForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager", output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    return model.eval()


def tokens_and_segments(
    cfg: ModelConfig, left_out: bool | tuple[int, ...], seed: int, positions: int = 29
) -> tuple[np.ndarray, np.ndarray]:
    """Rows of random tokens; `left_out` is how many are padding at the end of each, or whether any are."""
    if isinstance(left_out, bool):
        left_out = (2, 6, 10) if left_out else (0, 0, 0)
    shape = len(left_out), positions
    tokens = np.random.default_rng(seed).integers(3, cfg.vocab_size, shape).astype(np.int32)
    return tokens, (np.arange(positions) < positions - np.array(left_out)[:, None]).astype(np.int32)


def twin_forward(twin, tokens, segments) -> tuple[np.ndarray, list[tuple[np.ndarray, ...]]]:
    """Logits, and (router logits, chosen experts) of every MoE layer."""
    routed = []
    hooks = [
        layer.mlp.gate.register_forward_hook(lambda _, __, out: routed.append((out[0].numpy(), out[2].numpy())))
        for layer in twin.model.layers
        if hasattr(layer.mlp, "gate")
    ]
    with torch.no_grad():
        logits = twin(torch.tensor(tokens, dtype=torch.long), attention_mask=torch.tensor(segments, dtype=torch.long)).logits
    for hook in hooks:
        hook.remove()
    return logits.numpy(), routed


def our_forward(cfg, params, tokens, segments, monkeypatch, options=None, platform="cpu") -> tuple[np.ndarray, list[np.ndarray]]:
    """Jitted logits, and the chosen experts of every MoE layer, seen by a callback inside the scan. `options`: of the
    compiler; `platform`: whose entries of the registries are used."""
    chosen = []
    original = router.Router.__call__

    def watched(self, x_ND, call):
        experts, gates, scores = original(self, x_ND, call)
        jax.debug.callback(lambda e: chosen.append(np.asarray(e)), experts, ordered=True)
        return experts, gates, scores

    monkeypatch.setattr(router.Router, "__call__", watched)

    def forward(params, tokens, call):
        network = bind(cfg, params)
        return network.logits(network(tokens, call)[0], call)

    given = params, tokens, call_for(tokens, segments, platform=platform)
    if not jax.config.jax_disable_jit:
        forward = jax.jit(forward).lower(*given).compile(compiler_options=options)
    logits = np.asarray(forward(*given))
    jax.effects_barrier()
    return logits, chosen


def routing_margin(cfg: ModelConfig, router_logits: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """[N] how far each token's choice is from a different one: of experts, and of groups."""
    choice = 1 / (1 + np.exp(-router_logits.astype(np.float64))) + bias
    grouped = choice.reshape(len(choice), cfg.n_group, -1)
    groups = np.sort(np.sort(grouped, -1)[..., -2:].sum(-1), -1)
    of_groups = np.full(len(choice), np.inf)
    if cfg.n_group > cfg.topk_group:
        of_groups = groups[:, -cfg.topk_group] - groups[:, -cfg.topk_group - 1]
    kept = np.argsort(np.sort(grouped, -1)[..., -2:].sum(-1), -1)[:, -cfg.topk_group :]
    eligible = np.take_along_axis(grouped, kept[..., None], 1).reshape(len(choice), -1)
    eligible = np.sort(eligible, -1)
    if eligible.shape[1] == cfg.num_experts_per_tok:
        return of_groups
    return np.minimum(of_groups, eligible[:, -cfg.num_experts_per_tok] - eligible[:, -cfg.num_experts_per_tok - 1])


def compare(
    cfg: ModelConfig,
    params: dict[str, jax.Array],
    twin,
    tokens: np.ndarray,
    segments: np.ndarray,
    monkeypatch,
    options=None,
    platform="cpu",
) -> tuple[float, int]:
    """Asserts equal experts and logits; returns the relative error and the number of compared choices."""
    theirs, routed = twin_forward(twin, tokens, segments)
    ours, chosen = our_forward(cfg, params, tokens, segments, monkeypatch, options, platform)
    assert len(chosen) == len(routed) == cfg.num_moe_layers
    valid, compared = segments > 0, 0
    for layer, (mine, (router_logits, other)) in enumerate(zip(chosen, routed)):
        bias = np.asarray(params["moe.mlp.router_bias"][layer], np.float64)
        clear = valid.reshape(-1) & (routing_margin(cfg, router_logits, bias) > MARGIN)
        assert np.array_equal(np.sort(mine[clear], -1), np.sort(other[clear], -1))
        compared += int(clear.sum())
    error = np.abs(ours - theirs)[valid].max() / np.abs(theirs[valid]).max()
    assert error <= TOLERANCE
    return error, compared


@pytest.mark.parametrize("index, case", list(enumerate(covering(GRID))))
def test_logits_and_experts(index, case, tmp_path, monkeypatch):
    cfg = config_of(case)
    params = weights_of(cfg, case["bias"], index)
    tokens, segments = tokens_and_segments(cfg, case["left_out"], index)
    _, compared = compare(cfg, params, transformers_twin(cfg, params, tmp_path), tokens, segments, monkeypatch)
    assert compared > 50, "too few clear routing choices to mean anything"


def their_gradients(twin, cfg: ModelConfig) -> dict[str, np.ndarray]:
    """Gradients by checkpoint name; transformers keeps the experts of a layer fused."""
    grads = {}
    for name, p in twin.named_parameters():
        g = p.grad.numpy()
        if name.endswith("experts.gate_up_proj"):
            for e, half in itertools.product(range(cfg.n_routed_experts), range(2)):
                F = cfg.moe_intermediate_size
                grads[f"{name[:-12]}{e}.{('gate', 'up')[half]}_proj.weight"] = g[e, half * F : (half + 1) * F]
        elif name.endswith("experts.down_proj"):
            for e in range(cfg.n_routed_experts):
                grads[f"{name[:-9]}{e}.down_proj.weight"] = g[e]
        else:
            grads[name] = g
    return grads


GRADIENT_CASES = [
    dict(
        q_lora_rank=16,
        yarn=(32.0, 1.0),
        mscale=(1.0, 1.0),
        groups=(1, 1),
        bias=0.2,
        dense=1,
        n_shared_experts=1,
        norm_topk_prob=True,
        rms_norm_eps=1e-6,
        left_out=True,
    ),
    dict(
        q_lora_rank=None,
        yarn=(40.0, 32.0),
        mscale=(1.0, 1.0),
        groups=(4, 2),
        bias=0.2,
        dense=3,
        n_shared_experts=2,
        norm_topk_prob=False,
        rms_norm_eps=1e-5,
        left_out=False,
    ),
]


@pytest.mark.parametrize("case", GRADIENT_CASES)
def test_gradients(case, tmp_path):
    cfg = replace(config_of(case), vocab_size=64)
    params = weights_of(cfg, case["bias"], seed=0)
    tokens, segments = tokens_and_segments(cfg, case["left_out"], 1)
    valid = (segments[:, 1:] > 0).astype(np.float32)

    def loss(params):
        network, call = bind(cfg, params), call_for(tokens, segments)
        hidden, _, _ = network(tokens, call)
        nll, _ = cross_entropy.chunked(
            hidden[:, :-1].reshape(-1, hidden.shape[-1]), call.weight(network.head), jnp.asarray(tokens[:, 1:]).reshape(-1)
        )
        return jnp.sum(nll * valid.reshape(-1)) / valid.sum()

    value, ours = jax.jit(jax.value_and_grad(loss))(params)
    ours = {path: np.asarray(g) for path, g in ours.items()}
    twin = transformers_twin(cfg, params, tmp_path)
    long = torch.tensor(tokens, dtype=torch.long)
    logits = twin(long, attention_mask=torch.tensor(segments, dtype=torch.long)).logits
    nll = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), long[:, 1:].flatten(), reduction="none")
    total = (nll * torch.tensor(valid).flatten()).sum() / valid.sum()
    total.backward()
    assert float(value) == pytest.approx(total.item(), rel=1e-5)
    theirs = their_gradients(twin, cfg)
    compared = 0
    for slot in all_slots(param_specs(cfg)):
        mine = slot.to_hf(ours[slot.path][slot.block])
        if slot.spec.update == "router_bias":
            assert not mine.any(), "the router bias moves the choice only"
            continue
        other, scale = theirs[slot.name], max(np.abs(theirs[slot.name]).max(), 1e-6)
        # Gradients add two more passes of float32 rounding to the forward's 1e-6.
        assert np.abs(mine - other).max() <= 1e-4 * scale, slot.name
        compared += 1
    assert compared == len(theirs)


def test_greedy_generation(tmp_path):
    """Prompts of three lengths, decoded together here and one by one there."""
    cfg = config_of(GRADIENT_CASES[0])
    params = weights_of(cfg, GRADIENT_CASES[0]["bias"], seed=3)
    prompts = [np.random.default_rng(n).integers(3, cfg.vocab_size, n).tolist() for n in (3, 21, 9)]
    ours = generate_batch(
        cfg, params, prompts, max_new_tokens=12, stop_ids=(), serving=EXACT, amount=0, dtype="float32", platform="cpu"
    )
    twin = transformers_twin(cfg, params, tmp_path)
    for prompt, mine in zip(prompts, ours):
        theirs = twin.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert theirs[0, len(prompt) :].tolist() == mine
