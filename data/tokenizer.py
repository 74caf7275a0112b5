"""Text to token ids and back. Special tokens carry Kimi's names and are never found inside plain text.

`encode` sees plain text only: a user who types `<|im_end|>` gets the bytes of those ten characters. Special ids are
put between encoded pieces by the renderer (data/render.py), so no message can forge the frame around it.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from configs.schema import ConfigError
from data.chat_template import FILE as TEMPLATE_FILE
from data.chat_template import chat_template

BOS, EOS, PAD, UNK, EOT = "[BOS]", "[EOS]", "[PAD]", "[UNK]", "[EOT]"
IM_END, IM_MIDDLE = "<|im_end|>", "<|im_middle|>"
IM_USER, IM_ASSISTANT, IM_SYSTEM = "<|im_user|>", "<|im_assistant|>", "<|im_system|>"
CALLS_BEGIN, CALLS_END = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
CALL_BEGIN, CALL_ARGUMENT, CALL_END = "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"
THINK, THINK_END = "<think>", "</think>"

SPECIAL_NAMES = (
    BOS,
    PAD,
    IM_END,
    EOS,
    IM_USER,
    IM_ASSISTANT,
    EOT,
    IM_SYSTEM,
    CALLS_BEGIN,
    CALLS_END,
    CALL_BEGIN,
    CALL_ARGUMENT,
    CALL_END,
    IM_MIDDLE,
    THINK,
    THINK_END,
    UNK,
)
"""Order of the special ids after the plain vocabulary; configs/schema.py:ModelConfig relies on the first three."""

PLAIN_ANYWAY = (THINK, THINK_END)
"""Readers show these when they hide special tokens: thoughts stay visible to whoever parses the text."""


class Tokenizer(ABC):
    """Plain text <-> ids, plus the special tokens by name. Subclasses define the plain vocabulary."""

    vocab_size: int
    """Ids that may occur, special and unused ones included."""
    special: dict[str, int]
    """Special token ids by Kimi's names."""
    byte_lengths: np.ndarray
    """[vocab_size] int32: UTF-8 bytes of source text that a token stands for; 0 for special tokens."""

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Ids of plain text. Look-alikes of special tokens inside `text` stay plain text."""

    @abstractmethod
    def encode_many(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of every text, as integer arrays."""

    @abstractmethod
    def token_bytes(self, ids: Sequence[int]) -> bytes:
        """Bytes of plain ids (no special ones)."""

    @abstractmethod
    def tokenizer_json(self) -> dict:
        """The Hugging Face tokenizer.json of this tokenizer."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of any ids; special tokens appear by name, broken UTF-8 as U+FFFD. ValueError for ids out of range."""
        out, plain = [], []
        for i in map(int, ids):
            if not 0 <= i < self.vocab_size:
                raise ValueError(f"token id {i} lies outside the vocabulary of {self.vocab_size}")
            name = self.names.get(i)
            if name is None:
                plain.append(i)
                continue
            out.append(self.token_bytes(plain).decode("utf-8", "replace"))
            out.append(name)
            plain = []
        out.append(self.token_bytes(plain).decode("utf-8", "replace"))
        return "".join(out)

    @cached_property
    def names(self) -> dict[int, str]:
        """Special tokens by id."""
        return {i: name for name, i in self.special.items()}

    @property
    def bos_id(self) -> int:
        return self.special[BOS]

    @property
    def eos_id(self) -> int:
        """End of a message; what generation stops at."""
        return self.special[IM_END]

    @property
    def pad_id(self) -> int:
        return self.special[PAD]

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """End of a message and end of a document."""
        return self.special[IM_END], self.special[EOS]

    def fingerprint(self) -> str:
        """Hash of everything that decides which ids a text gets."""
        return hashlib.sha256(json.dumps(self.tokenizer_json(), sort_keys=True).encode()).hexdigest()[:16]

    def save(self, directory: str | Path, system: str | None = None, mode: str = "interleaved") -> None:
        """Write tokenizer.json, tokenizer_config.json and chat_template.jinja, as transformers and llama.cpp read them.

        system, mode   data.system, which the template inserts when a conversation brings none, and data.mode
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BOS,
            "eos_token": IM_END,
            "pad_token": PAD,
            "unk_token": UNK,
            "add_bos_token": False,
            "add_eos_token": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": 1 << 30,
        }
        (directory / "tokenizer.json").write_text(json.dumps(self.tokenizer_json(), ensure_ascii=False, indent=1))
        (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=1))
        (directory / TEMPLATE_FILE).write_text(chat_template(system, mode), encoding="utf-8")


def added_tokens(special: dict[str, int]) -> list[dict]:
    """The `added_tokens` entries of tokenizer.json."""
    return [
        {
            "id": i,
            "content": name,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": name not in PLAIN_ANYWAY,
        }
        for name, i in sorted(special.items(), key=lambda kv: kv[1])
    ]


def byte_characters() -> list[str]:
    """The printable character that byte-level BPE files write for each of the 256 bytes.

    Printable Latin-1 bytes stand for themselves; the others take the code points from 256 on, in order (GPT-2).
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(others)) for b in range(256)]


class ByteTokenizer(Tokenizer):
    """Ids 0..255 are the bytes, 256.. the special tokens; needs no file.

    One merge of two 0xFF bytes, which UTF-8 never contains, is there because BPE readers refuse a file without merges.
    """

    vocab_size = 320

    def __init__(self):
        self.special = {name: 256 + i for i, name in enumerate(SPECIAL_NAMES)}
        self.merged = 256 + len(SPECIAL_NAMES)
        self.byte_lengths = np.zeros(self.vocab_size, np.int32)
        self.byte_lengths[:256] = 1
        self.byte_lengths[self.merged] = 2

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8", "replace"))

    def encode_many(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode("utf-8", "replace"), np.uint8) for text in texts]

    def token_bytes(self, ids: Sequence[int]) -> bytes:
        unused = b"\xff"
        return b"".join(bytes([i]) if i < 256 else b"\xff\xff" if i == self.merged else unused for i in ids)

    def tokenizer_json(self) -> dict:
        char = byte_characters()
        # The special tokens stand here too: readers number added tokens by the size of this table otherwise.
        vocab = {char[b]: b for b in range(256)} | self.special | {char[255] * 2: self.merged}
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": added_tokens(self.special),
            "normalizer": None,
            "pre_tokenizer": byte_level,
            "post_processor": None,
            "decoder": byte_level,
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": False,
                "ignore_merges": False,
                "vocab": vocab,
                "merges": [[char[255], char[255]]],
            },
        }


def load_tokenizer(name_or_path: str) -> Tokenizer:
    """`bytes`, or the path of a Hugging Face tokenizer.json (or its folder), or of a tiktoken file.

    ConfigError when the path is missing or is neither.
    """
    if name_or_path == "bytes":
        return ByteTokenizer()
    path = Path(name_or_path)
    if path.is_dir():
        path = path / "tokenizer.json"
    if not path.is_file():
        raise ConfigError(f"data.tokenizer: no file {path}; give `bytes`, a tokenizer.json or a tiktoken file")
    from data import hf_tokenizer

    return hf_tokenizer.load(path)
