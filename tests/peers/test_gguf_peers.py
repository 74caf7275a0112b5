"""The GGUF export read back by the gguf package, and run by llama.cpp itself (as xllamacpp ships it, compiled)."""

import json
import urllib.request

import jinja2
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from configs.schema import ConfigError, ModelConfig
from data.render import KimiRenderer
from data.tokenizer import ByteTokenizer
from quant.export import export_model
from quant.gguf_export import q4_0_blocks, q4_0_values, write_gguf
from quant.packed import projections
from quant.source import InMemory
from quant.tensor_file import Checkpoint
from tests.quant.small_model import INT4, MODEL, random_weights, specs_of

gguf = pytest.importorskip("gguf")

SMALL = ModelConfig(
    **{
        **MODEL.__dict__,
        "vocab_size": 320,
        "hidden_size": 128,
        "moe_intermediate_size": 64,
        "bos_token_id": 256,
        "eos_token_id": 258,
        "pad_token_id": 257,
        "max_position_embeddings": 256,
    }
)
YARN = ModelConfig(**{**SMALL.__dict__, "yarn_factor": 4.0, "yarn_original_positions": 64})
GROUPED = ModelConfig(**{**SMALL.__dict__, "n_routed_experts": 8, "n_group": 2, "topk_group": 1, "routed_scaling_factor": 1.7})


def hf_directory(directory, model):
    specs = specs_of(model)
    export_model(InMemory(random_weights(specs, scale=0.08)), specs, model, INT4, directory, tokenizer=ByteTokenizer())
    return directory


def test_blocks_agree_with_the_package():
    rng = np.random.default_rng(0)
    codes = rng.integers(-7, 8, (4, 64)).astype(np.int8)
    scales = rng.uniform(0.01, 0.02, (4, 2)).astype(np.float16).astype(np.float32)
    blocks = q4_0_blocks(codes, scales)
    want = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.Q4_0)
    np.testing.assert_array_equal(q4_0_values(blocks), want)
    np.testing.assert_array_equal(want, codes * scales.repeat(32, 1))


def test_every_code_survives_and_every_weight_is_there(tmp_path):
    directory = hf_directory(tmp_path / "hf", SMALL)
    summary = write_gguf(directory, tmp_path / "model.gguf")
    assert summary.inexact_scales == 0 and not summary.notes
    tensors = {t.name: t for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert len(tensors) == summary.tensors
    checkpoint = Checkpoint(directory)
    packed = projections(checkpoint)
    for part in ("gate", "up", "down"):
        stored = np.asarray(tensors[f"blk.2.ffn_{part}_exps.weight"].data)
        for e in range(SMALL.n_routed_experts):
            p = packed[f"model.layers.2.mlp.experts.{e}.{part}_proj"]
            scales = p.scales(checkpoint).astype(np.float32)
            np.testing.assert_array_equal(stored[e], q4_0_blocks(p.codes(checkpoint), scales))
    router = np.asarray(tensors["blk.1.ffn_gate_inp.weight"].data)
    np.testing.assert_array_equal(router, checkpoint.read("model.layers.1.mlp.gate.weight").astype(np.float32))


def test_existing_files_and_plain_directories_are_refused(tmp_path):
    directory = hf_directory(tmp_path / "hf", SMALL)
    (tmp_path / "there.gguf").write_text("x")
    with pytest.raises(ConfigError, match="exists"):
        write_gguf(directory, tmp_path / "there.gguf")
    (directory / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        write_gguf(directory, tmp_path / "new.gguf")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "there.gguf"]


class LlamaCpp:
    """llama.cpp's server in this process, on one thread."""

    def __init__(self, file):
        xllamacpp = pytest.importorskip("xllamacpp")
        params = xllamacpp.CommonParams()
        params.model.path, params.n_ctx, params.n_parallel, params.warmup = str(file), 64, 1, False
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        self.server = xllamacpp.Server(params)

    def ask(self, path: str, **question):
        request = urllib.request.Request(
            self.server.listening_address + path, json.dumps(question).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def log_probabilities(self, tokens: list[int], vocabulary: int) -> np.ndarray:
        """[N, V], each row from a prompt of its own: the server tells about what comes next only. It says nothing about a
        token that breaks off inside a UTF-8 character, so the next one is made to be an A; probabilities are without that."""
        out = np.full((len(tokens), vocabulary), np.nan, np.float32)
        for at in range(len(tokens)):
            answer = self.ask(
                "/completion",
                prompt=tokens[: at + 1],
                n_predict=1,
                n_probs=vocabulary,
                cache_prompt=False,
                temperature=0,
                logit_bias=[[ord("A"), 1000]],
            )
            for entry in answer["completion_probabilities"][0]["top_logprobs"]:
                out[at, entry["id"]] = entry["logprob"]
        assert np.isfinite(out).all()
        return out


def test_llama_cpp_splits_text_into_the_same_tokens(tmp_path):
    pytest.importorskip("xllamacpp")
    write_gguf(hf_directory(tmp_path / "hf", SMALL), tmp_path / "model.gguf")
    model, text = LlamaCpp(tmp_path / "model.gguf"), "h\u00e9llo  3 + 4\n\n\u2713"
    assert model.ask("/tokenize", content=text, add_special=False)["tokens"] == ByteTokenizer().encode(text)
    assert model.ask("/tokenize", content="a<|im_end|>", add_special=False)["tokens"] == [97, 258]


SCHEMA = {
    "type": "object",
    "required": ["key"],
    "properties": {
        "key": {"type": "string", "enum": ["\u00e4\n", "<&'\"", ""]},
        "N": {"minimum": 0.5},
        "\u00e9": {},
        "e": {"const": [None, True, -3, {}]},
    },
}
TOOLS = [
    {"type": "function", "function": {"name": name, "description": "of " + name, "parameters": SCHEMA}} for name in ("get", "put")
]
TALK = [
    {"role": "user", "content": "q"},
    {
        "role": "assistant",
        "content": "",
        "reasoning_content": "hm",
        "tool_calls": [
            {
                "id": "functions.get:0",
                "type": "function",
                "function": {"name": "get", "arguments": '{"key": "\u00e4", "of": [1, null, {"x": true}]}'},
            }
        ],
    },
    {"role": "tool", "tool_call_id": "functions.get:0", "name": "get", "content": "7"},
]
DONE = [*TALK, {"role": "assistant", "content": "7", "reasoning_content": "so"}, {"role": "user", "content": "and?"}]


def bare_tojson(value):
    """What every template engine's tojson does: llama.cpp's refuses sort_keys, older ones most arguments."""
    return json.dumps(value, ensure_ascii=False)


@pytest.mark.parametrize("messages", [TALK[:1], TALK, DONE], ids=["question", "result", "history"])
def test_the_chat_template_asks_little_of_an_engine(tmp_path, messages):
    write_gguf(hf_directory(tmp_path / "hf", SMALL), tmp_path / "model.gguf")
    field = gguf.GGUFReader(tmp_path / "model.gguf").get_field("tokenizer.chat_template")
    engine = jinja2.Environment()
    engine.filters["tojson"] = bare_tojson
    text = engine.from_string(field.contents()).render(
        messages=messages, tools=TOOLS, add_generation_prompt=True, preserve_thinking=True
    )
    assert text == ByteTokenizer().decode(KimiRenderer(ByteTokenizer()).prompt(messages, TOOLS))


def test_llama_cpp_renders_the_prompts_of_training(tmp_path):
    pytest.importorskip("xllamacpp")
    write_gguf(hf_directory(tmp_path / "hf", SMALL), tmp_path / "model.gguf")
    model, tokenizer = LlamaCpp(tmp_path / "model.gguf"), ByteTokenizer()
    for messages in (TALK[:1], TALK, DONE):
        for tools in ([], TOOLS):
            asked = model.ask(
                "/apply-template",
                messages=messages,
                chat_template_kwargs={"preserve_reasoning": True},
                **({"tools": tools} if tools else {}),
            )
            assert asked["prompt"] == tokenizer.decode(KimiRenderer(tokenizer).prompt(messages, tools))


def choice_margins(gate, router_logits) -> torch.Tensor:
    """[N]: by how much the chosen groups, and in them the chosen experts, beat the next ones."""

    def lead(scores, chosen):
        best = scores.sort(-1, descending=True).values
        return best[:, chosen - 1] - best[:, chosen] if chosen < scores.shape[-1] else torch.full(best.shape[:1], torch.inf)

    scores = (router_logits.sigmoid() + gate.e_score_correction_bias).unflatten(-1, (gate.num_group, -1))
    groups = scores.topk(2, -1).values.sum(-1)
    kept = groups.topk(gate.topk_group, -1).indices
    within = scores.take_along_dim(kept[..., None], 1).flatten(1)
    return torch.minimum(lead(groups, gate.topk_group), lead(within, gate.top_k))


@pytest.mark.parametrize("model", [SMALL, YARN, GROUPED], ids=["plain", "yarn", "groups"])
def test_llama_cpp_computes_the_same_function(tmp_path, model):
    """Against transformers in float32 on the dequantised weights. llama.cpp rounds activations to 8 bits before a Q4_0
    product: a KL of some 1e-4, where a wrong router or rope gives more than 0.1. That rounding also decides near ties of the
    router (flips were seen at leads of 1e-4 to 4e-4), so tokens whose choice hangs on less than 2e-3 are not judged."""
    pytest.importorskip("xllamacpp")
    directory = hf_directory(tmp_path / "hf", model)
    write_gguf(directory, tmp_path / "model.gguf")
    tokens = [int(t) for t in np.random.default_rng(0).integers(0, 256, 48)]
    twin = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16, attn_implementation="eager")
    torch.nn.Module.to(twin, torch.float32)
    margins = []
    for layer in twin.model.layers[model.first_k_dense_replace :]:
        layer.mlp.gate.register_forward_hook(lambda gate, _, out: margins.append(choice_margins(gate, out[0])))
    with torch.no_grad():
        want = torch.log_softmax(twin(torch.tensor([tokens])).logits[0], -1)
    clear = torch.stack(margins).amin(0) > 2e-3
    assert len(margins) == model.num_hidden_layers - model.first_k_dense_replace and clear.sum() >= 40
    got = torch.tensor(LlamaCpp(tmp_path / "model.gguf").log_probabilities(tokens, model.vocab_size))
    kl = (want.exp() * (want - got)).sum(-1)[clear]
    assert want.exp().max(-1).values.mean() > 2 / model.vocab_size  # not a uniform model
    assert kl.mean() < 2e-3 and kl.max() < 2e-2, (kl.mean(), kl.max())
