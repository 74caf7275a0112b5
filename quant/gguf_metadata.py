"""What a GGUF file says besides its tensors: the architecture's sizes, and the vocabulary."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.schema import ConfigError, ModelConfig

HARMLESS_MERGES = 1
"""Merges of a byte tokenizer; with more, llama.cpp must know the text splitter by name."""


def write_architecture(writer, m: ModelConfig, gguf) -> None:
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
class Vocabulary:
    """tokens and types by id; `splitter` is llama.cpp's name of the rule that cuts text before merging."""

    tokens: list[str]
    types: list[int]
    merges: list[str]
    splitter: str
    special: dict[str, int]
    chat_template: str | None


NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
"""GGUF token types."""


def read_vocabulary(directory: Path, m: ModelConfig, pre_tokenizer: str | None) -> Vocabulary:
    """From tokenizer.json and chat_template.jinja; raises ConfigError where the splitter must be named and is not, or a file is
    damaged."""
    path, template = directory / "tokenizer.json", directory / "chat_template.jinja"
    if not path.exists():
        raise ConfigError(f"{directory} has no tokenizer.json, which llama.cpp needs inside the file")
    try:
        chat_template = template.read_text(encoding="utf-8") if template.exists() else None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{template} is not UTF-8 ({error}); restore it, or remove it") from None
    try:
        return _vocabulary(json.loads(path.read_text()), chat_template, m, pre_tokenizer)
    except ConfigError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{path} is no Hugging Face tokenizer ({error!r}); restore it") from None


def _vocabulary(content: dict[str, Any], chat_template: str | None, m: ModelConfig, pre_tokenizer: str | None) -> Vocabulary:
    model = content["model"]
    if model.get("type") != "BPE":
        raise ConfigError(f"tokenizer.json is a {model.get('type')} model; only byte-level BPE is written to GGUF here")
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    if pre_tokenizer is None and len(merges) > HARMLESS_MERGES:
        raise ConfigError(
            "name llama.cpp's pre-tokenizer for this vocabulary with --pre-tokenizer (kimi-k2, gpt-2, ...): GGUF cannot hold the "
            "rule that splits text, and a wrong one changes token ids"
        )
    largest = max([*model["vocab"].values(), *(added["id"] for added in content.get("added_tokens", []))])
    if largest >= m.vocab_size:
        raise ConfigError(f"tokenizer.json holds id {largest}, but config.json's vocab_size is {m.vocab_size}")
    tokens, types = [f"[PAD{i}]" for i in range(m.vocab_size)], [UNUSED] * m.vocab_size
    for token, i in model["vocab"].items():
        tokens[i], types[i] = token, NORMAL
    for added in content.get("added_tokens", []):
        tokens[added["id"]] = added["content"]
        types[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    return Vocabulary(
        tokens,
        types,
        merges,
        pre_tokenizer or "gpt-2",
        {"bos": m.bos_token_id, "eos": m.eos_token_id, "pad": m.pad_token_id},
        chat_template,
    )


def write_vocabulary(writer, v: Vocabulary) -> None:
    """Tokens, merges, special ids and chat template, under the keys llama.cpp reads."""
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
