"""INT4 directory -> one GGUF file for llama.cpp, with every code unchanged.

A Q4_0 block is a group as it is: an fp16 scale and 32 nibbles, value (nibble - 8) * scale. A bf16 scale of at least
2**-17 is exact in fp16, so nothing is quantised again; smaller ones are counted and reported. llama.cpp's own
quantiser would choose other scales and change most weights of this grid.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from configs.schema import ConfigError
from quant.export import written_whole
from quant.gguf_metadata import read_vocabulary, write_architecture, write_vocabulary
from quant.packed import Packed, projections
from quant.read_config import ReadConfig, read_config
from quant.tensor_file import Checkpoint

GROUP = 32
BLOCK_BYTES = 2 + GROUP // 2
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


def write_gguf(directory: str | Path, out_file: str | Path, pre_tokenizer: str | None = None) -> GGUFSummary:
    """Convert an INT4 pack-quantized directory of the DeepSeek-V3 family.

    pre_tokenizer   llama.cpp's name of the rule that splits text before merging ("kimi-k2", "gpt-2", ...); needed where
                    tokenizer.json holds merges, because the file format has no place for the rule itself

    Raises ConfigError where `out_file` exists, gguf is not installed, or the directory is not INT4 in groups of 32.
    """
    try:
        import gguf
    except ImportError:
        raise ConfigError("GGUF export needs the gguf package; install it, or the `gguf` extra of this project") from None
    out_file = Path(out_file)
    if out_file.exists():
        raise ConfigError(f"{out_file} exists; choose another name or remove it first")
    config = read_config(directory)
    if config.quant.grid == "none" or config.quant.group_size != GROUP:
        raise ConfigError("GGUF export keeps INT4 codes: it needs a directory with groups of 32; export to int4 first")
    source = _Source(Path(directory), config)
    vocabulary = read_vocabulary(Path(directory), config.model, pre_tokenizer)
    with written_whole(out_file) as partial_file:
        writer = gguf.GGUFWriter(partial_file, "deepseek2")
        write_architecture(writer, config.model, gguf)
        write_vocabulary(writer, vocabulary)
        count = _write_tensors(writer, source, gguf)
    notes = list(config.notes)
    if source.inexact:
        notes.append(f"{source.inexact} of {source.groups} scales lie below 2**-17 or above 65504 and were rounded to fp16")
    if config.model.yarn_factor != 1 and config.model.yarn_beta_fast != 32:
        notes.append(f"llama.cpp ignores the file's beta_fast: run it with --yarn-beta-fast {config.model.yarn_beta_fast:g}")
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

        yield _Tensor(
            f"{block}.attn_k_b.weight",
            (m.num_attention_heads, m.kv_lora_rank, m.qk_nope_head_dim),
            kind,
            lambda: heads()[:, : m.qk_nope_head_dim].transpose(0, 2, 1),
        )
        yield _Tensor(
            f"{block}.attn_v_b.weight",
            (m.num_attention_heads, m.v_head_dim, m.kv_lora_rank),
            kind,
            lambda: heads()[:, m.qk_nope_head_dim :],
        )

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
