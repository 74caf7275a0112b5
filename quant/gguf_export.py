"""INT4 directory -> one GGUF file for llama.cpp, with every code unchanged.

A Q4_0 block is a group as it is: an fp16 scale and 32 nibbles, value (nibble - 8) * scale. A bf16 scale of at least
2**-17 is exact in fp16, so nothing is quantised again; smaller ones are counted and reported. llama.cpp's own
quantiser would choose other scales and change most weights of this grid.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from configs.schema import ConfigError, ModelConfig
from quant.packed import Packed, projections
from quant.read_config import ReadConfig, read_config
from quant.tensor_file import Checkpoint

GROUP = 32
BLOCK_BYTES = 2 + GROUP // 2
MOST_NOTHING_MERGES = 1
"""Merges of a byte tokenizer; with more, llama.cpp must know the text splitter by name."""

LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_a_layernorm": "attn_q_a_norm",
    "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
    "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
}
"""Modules of a layer and their GGUF names; kv_b, the router bias and the experts are written apart."""

TOP_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


@dataclass(frozen=True)
class GGUFSummary:
    """codes_changed is 0 by construction; inexact_scales counts groups whose scale fp16 cannot hold."""

    file: Path
    tensors: int
    groups: int
    inexact_scales: int
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Tensor:
    """A tensor to be written. `kind` is a name of gguf.GGMLQuantizationType, `shape` the values', `load` reads them:
    float32, or blocks of bytes for Q4_0."""

    name: str
    shape: tuple[int, ...]
    kind: str
    load: Callable[[], np.ndarray]

    @property
    def byte_shape(self) -> tuple[int, ...]:
        last = {"F32": 4 * self.shape[-1], "BF16": 2 * self.shape[-1], "Q4_0": self.shape[-1] // GROUP * BLOCK_BYTES}
        return *self.shape[:-1], last[self.kind]

    def data(self) -> np.ndarray:
        """Bytes of `byte_shape`."""
        values = np.ascontiguousarray(self.load())
        if self.kind == "BF16":
            values = values.astype(ml_dtypes.bfloat16)
        return values.view(np.uint8).reshape(self.byte_shape)


def q4_0_blocks(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """[.., I] int8 codes and [.., I/32] scales -> [.., I/32*18] bytes. Element j of a block is the low half of byte j,
    element j + 16 the high half."""
    nibbles = (codes + np.int8(8)).view(np.uint8).reshape(*scales.shape, 2, GROUP // 2)
    packed = nibbles[..., 0, :] | (nibbles[..., 1, :] << 4)
    d = scales.astype("<f2")[..., None].view(np.uint8)
    return np.concatenate([d, packed], axis=-1).reshape(*codes.shape[:-1], -1)


def q4_0_values(blocks: np.ndarray) -> np.ndarray:
    """The inverse, as llama.cpp reads it: float32 (nibble - 8) * scale, not rounded to bf16."""
    b = blocks.reshape(*blocks.shape[:-1], -1, BLOCK_BYTES)
    d = b[..., :2].copy().view("<f2").astype(np.float32)
    nibbles = np.concatenate([b[..., 2:] & 15, b[..., 2:] >> 4], axis=-1).astype(np.float32)
    return ((nibbles - 8) * d).reshape(*blocks.shape[:-1], -1)


def write_gguf(directory: str | Path, out_file: str | Path, *, pre_tokenizer: str | None = None) -> GGUFSummary:
    """Convert an INT4 pack-quantized directory of the DeepSeek-V3 family.

    pre_tokenizer   llama.cpp's name of the rule that splits text before merging ("kimi-k2", "gpt-2", ...); needed where
                    tokenizer.json holds merges, because the file format has no place for the rule itself

    Raises ConfigError where `out_file` exists, gguf is not installed, or the directory is not INT4 in groups of 32.
    """
    try:
        import gguf
    except ImportError:
        raise ConfigError(
            "GGUF export needs the gguf package; install it, or the `gguf` extra of this project"
        ) from None
    out_file = Path(out_file)
    if out_file.exists():
        raise ConfigError(f"{out_file} exists; choose another name or remove it first")
    config = read_config(directory)
    if config.quant.grid == "none" or config.quant.group_size != GROUP:
        raise ConfigError("GGUF export keeps INT4 codes: it needs a directory with groups of 32; export to int4 first")
    source = _Source(Path(directory), config)
    vocabulary = _vocabulary(Path(directory), config.model, pre_tokenizer)
    out_file.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{out_file.name}.", dir=out_file.parent))
    try:
        writer = gguf.GGUFWriter(scratch / "model.gguf", "deepseek2")
        _metadata(writer, config.model, gguf)
        _write_vocabulary(writer, vocabulary)
        count = _write_tensors(writer, source, gguf)
        os.rename(scratch / "model.gguf", out_file)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    notes = list(config.notes)
    if source.inexact:
        notes.append(
            f"{source.inexact} of {source.groups} scales lie below 2**-17 or above 65504 and were rounded to fp16"
        )
    if config.model.yarn_factor != 1 and config.model.yarn_beta_fast != 32:
        notes.append(
            f"llama.cpp ignores the file's beta_fast: run it with --yarn-beta-fast {config.model.yarn_beta_fast:g}"
        )
    return GGUFSummary(out_file, count, source.groups, source.inexact, tuple(notes))


class _Source:
    """Tensors of the directory under GGUF names; values are read when they are written, one projection of a layer."""

    def __init__(self, directory: Path, config: ReadConfig):
        self.checkpoint, self.model, self.prefix = Checkpoint(directory), config.model, config.prefix
        self.packed: dict[str, Packed] = projections(self.checkpoint)
        self.groups = self.inexact = 0

    def tensors(self) -> Iterator[_Tensor]:
        for module, name in TOP_NAMES.items():
            yield self._plain(f"{module}.weight", f"{name}.weight")
        for i in range(self.model.num_hidden_layers):
            yield from self._layer(f"model.layers.{i}", f"blk.{i}", i >= self.model.first_k_dense_replace)

    def _layer(self, stem: str, block: str, moe: bool) -> Iterator[_Tensor]:
        for module, name in LAYER_NAMES.items():
            if f"{self.prefix}{stem}.{module}.weight" in self.checkpoint:
                yield self._plain(f"{stem}.{module}.weight", f"{block}.{name}.weight", exact=name == "ffn_gate_inp")
        yield from self._latent_projections(f"{stem}.self_attn.kv_b_proj.weight", block)
        if moe:
            yield self._plain(f"{stem}.mlp.gate.e_score_correction_bias", f"{block}.exp_probs_b.bias")
            for part in ("gate", "up", "down"):
                yield self._experts(f"{stem}.mlp.experts", part, f"{block}.ffn_{part}_exps.weight")

    def _read(self, tensor: str) -> np.ndarray:
        return self.checkpoint.read(self.prefix + tensor).astype(np.float32)

    def _plain(self, tensor: str, name: str, exact: bool = False) -> _Tensor:
        """llama.cpp wants vectors, and the router, in f32; matrices as they are served."""
        shape = self.checkpoint.shape(self.prefix + tensor)
        kind = "F32" if exact or len(shape) == 1 or self.model.dtype == "float32" else "BF16"
        return _Tensor(name, shape, kind, lambda: self._read(tensor))

    def _latent_projections(self, tensor: str, block: str) -> Iterator[_Tensor]:
        """kv_b apart: keys [H, R, nope], transposed because queries are moved into the latent, and values [H, v, R]."""
        m = self.model
        kind = "F32" if m.dtype == "float32" else "BF16"

        def heads() -> np.ndarray:
            return self._read(tensor).reshape(m.num_attention_heads, -1, m.kv_lora_rank)

        yield _Tensor(f"{block}.attn_k_b.weight", (m.num_attention_heads, m.kv_lora_rank, m.qk_nope_head_dim), kind,
                      lambda: heads()[:, :m.qk_nope_head_dim].transpose(0, 2, 1))
        yield _Tensor(f"{block}.attn_v_b.weight", (m.num_attention_heads, m.v_head_dim, m.kv_lora_rank), kind,
                      lambda: heads()[:, m.qk_nope_head_dim:])

    def _experts(self, stem: str, part: str, name: str) -> _Tensor:
        stems = [f"{self.prefix}{stem}.{e}.{part}_proj" for e in range(self.model.n_routed_experts)]
        missing = next((s for s in stems if s not in self.packed), None)
        if missing is not None:
            raise ConfigError(f"{missing} is not packed, or is missing; run verify on the directory")

        def load() -> np.ndarray:
            return np.stack([self._blocks(self.packed[s]) for s in stems])

        return _Tensor(name, (len(stems), *self.packed[stems[0]].shape), "Q4_0", load)

    def _blocks(self, projection: Packed) -> np.ndarray:
        scales = projection.scales(self.checkpoint).astype(np.float32)
        self.groups += scales.size
        self.inexact += int((scales.astype(np.float16).astype(np.float32) != scales).sum())
        return q4_0_blocks(projection.codes(self.checkpoint), scales)


def _write_tensors(writer, source: _Source, gguf) -> int:
    """The table of contents first, then the values in the same order."""
    tensors = list(source.tensors())
    for t in tensors:
        kind = getattr(gguf.GGMLQuantizationType, t.kind)
        writer.add_tensor_info(t.name, t.byte_shape, np.dtype(np.uint8), math.prod(t.byte_shape), kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for t in tensors:
        writer.write_tensor_data(t.data())
    writer.close()
    return len(tensors)


def _metadata(writer, m: ModelConfig, gguf) -> None:
    """Keys of llama.cpp's `deepseek2`: latent attention appears as one key/value head of the latent's width."""
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(m.vocab_size)
    writer.add_block_count(m.num_hidden_layers)
    writer.add_leading_dense_block_count(m.first_k_dense_replace)
    writer.add_context_length(m.max_position_embeddings)
    writer.add_embedding_length(m.hidden_size)
    writer.add_feed_forward_length(m.intermediate_size)
    writer.add_layer_norm_rms_eps(m.rms_norm_eps)
    writer.add_head_count(m.num_attention_heads)
    writer.add_head_count_kv(1)
    if m.q_lora_rank is not None:
        writer.add_q_lora_rank(m.q_lora_rank)
    writer.add_kv_lora_rank(m.kv_lora_rank)
    writer.add_key_length(m.kv_lora_rank + m.qk_rope_head_dim)
    writer.add_value_length(m.kv_lora_rank)
    writer.add_key_length_mla(m.qk_head_dim)
    writer.add_value_length_mla(m.v_head_dim)
    writer.add_expert_count(m.n_routed_experts)
    writer.add_expert_used_count(m.num_experts_per_tok)
    writer.add_expert_shared_count(m.n_shared_experts)
    writer.add_expert_feed_forward_length(m.moe_intermediate_size)
    writer.add_expert_weights_scale(m.routed_scaling_factor)
    writer.add_expert_weights_norm(m.norm_topk_prob)
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    if m.n_group > 1:
        writer.add_expert_group_count(m.n_group)
        writer.add_expert_group_used_count(m.topk_group)
    writer.add_rope_dimension_count(m.qk_rope_head_dim)
    writer.add_rope_freq_base(m.rope_theta)
    if m.yarn_factor != 1:
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(m.yarn_factor)
        writer.add_rope_scaling_orig_ctx_len(m.yarn_original_positions)
        writer.add_rope_scaling_yarn_beta_fast(m.yarn_beta_fast)
        writer.add_rope_scaling_yarn_beta_slow(m.yarn_beta_slow)
        # The loader divides by 0.1 again.
        writer.add_rope_scaling_yarn_log_mul(0.1 * m.yarn_mscale_all_dim)


@dataclass(frozen=True)
class _Vocabulary:
    tokens: list[str]
    types: list[int]
    merges: list[str]
    splitter: str
    special: dict[str, int]
    chat_template: str | None


NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
"""GGUF token types."""


def _vocabulary(directory: Path, m: ModelConfig, pre_tokenizer: str | None) -> _Vocabulary:
    path = directory / "tokenizer.json"
    if not path.exists():
        raise ConfigError(f"{directory} has no tokenizer.json, which llama.cpp needs inside the file")
    content = json.loads(path.read_text())
    model = content["model"]
    if model.get("type") != "BPE":
        raise ConfigError(f"tokenizer.json is a {model.get('type')} model; only byte-level BPE is written to GGUF here")
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    if pre_tokenizer is None and len(merges) > MOST_NOTHING_MERGES:
        raise ConfigError(
            "name llama.cpp's pre-tokenizer for this vocabulary (kimi-k2, gpt-2, ...): GGUF cannot hold the "
            "rule that splits text, and a wrong one changes token ids"
        )
    tokens, types = [f"[PAD{i}]" for i in range(m.vocab_size)], [UNUSED] * m.vocab_size
    for token, i in model["vocab"].items():
        tokens[i], types[i] = token, NORMAL
    for added in content.get("added_tokens", []):
        tokens[added["id"]] = added["content"]
        types[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    template = directory / "chat_template.jinja"
    return _Vocabulary(tokens, types, merges, pre_tokenizer or "gpt-2",
                       {"bos": m.bos_token_id, "eos": m.eos_token_id, "pad": m.pad_token_id},
                       template.read_text() if template.exists() else None)


def _write_vocabulary(writer, v: _Vocabulary) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(v.splitter)
    writer.add_token_list(v.tokens)
    writer.add_token_types(v.types)
    writer.add_token_merges(v.merges)
    writer.add_bos_token_id(v.special["bos"])
    writer.add_eos_token_id(v.special["eos"])
    writer.add_pad_token_id(v.special["pad"])
    writer.add_add_bos_token(False)
    if v.chat_template is not None:
        writer.add_chat_template(v.chat_template)
