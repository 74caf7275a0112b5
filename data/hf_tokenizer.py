"""Tokenizers from files: Hugging Face's tokenizer.json, and tiktoken rank files with Kimi's split pattern.

Both run in the `tokenizers` library. Plain text is encoded by a copy from which every added token is removed, so that
nothing a user types can become a control token. Kimi's special tokens that a file does not have are put behind its ids.
"""

from __future__ import annotations

import base64
import binascii
import copy
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from configs.schema import ConfigError
from data import tokenizer as tok
from data.tokenizer import SPECIAL_NAMES, Tokenizer, added_tokens, byte_characters

HIDDEN = "\U0010ffff"
"""A code point that Unicode keeps out of use. Pieces that must not be found are spelled with it; texts lose it."""


class FileTokenizer(Tokenizer):
    """A tokenizer described by the content of a tokenizer.json."""

    def __init__(self, spec: dict):
        self.spec = _with_specials(spec)
        added = {token["content"]: token["id"] for token in self.spec["added_tokens"]}
        self.special = {name: added[name] for name in SPECIAL_NAMES}
        text = _text_names(self.spec)
        self._added = {i: name for name, i in added.items() if name not in text}
        self._plain = tokenizers.Tokenizer.from_str(json.dumps(_without_added(self.spec)))
        vocabulary = _vocabulary(self.spec["model"]) | added
        self._pieces = {i: piece for piece, i in vocabulary.items() if i not in self._added}
        self.vocab_size = max([*vocabulary.values(), *self._added]) + 1
        self._byte_level = _byte_level(self.spec)
        self._byte_of = {char: byte for byte, char in enumerate(byte_characters())}
        self.byte_lengths = np.zeros(self.vocab_size, np.int32)
        for i, piece in self._pieces.items():
            self.byte_lengths[i] = len(self._piece_bytes(piece))

    @cached_property
    def names(self) -> dict[int, str]:
        return self._added

    def encode(self, text: str) -> list[int]:
        return self._plain.encode(_valid(text), add_special_tokens=False).ids

    def encode_many(self, texts: Sequence[str]) -> list[np.ndarray]:
        encoded = self._plain.encode_batch_fast(list(map(_valid, texts)), add_special_tokens=False)
        return [np.array(e.ids, np.int32) for e in encoded]

    def token_bytes(self, ids: Sequence[int]) -> bytes:
        if self._byte_level:
            return b"".join(self._piece_bytes(self._pieces.get(i, "\u0143")) for i in ids)
        return self._plain.decode([i for i in ids if i in self._pieces], skip_special_tokens=False).encode()

    def _piece_bytes(self, piece: str) -> bytes:
        """Source text of a piece. Exact for byte-level files; elsewhere spaces and byte pieces are recognised."""
        if piece.isspace():  # an added token: byte-level files spell no piece with spaces
            return piece.encode()
        if self._byte_level:
            return bytes(self._byte_of[char] for char in piece if char in self._byte_of)
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes([int(piece[3:5], 16)])
        return piece.replace("\u2581", " ").removeprefix("##").encode("utf-8", "replace")

    def tokenizer_json(self) -> dict:
        return self.spec


def load(path: Path) -> FileTokenizer:
    """Read a tokenizer.json or a tiktoken file. ConfigError if it is neither."""
    raw = path.read_bytes()
    if raw.lstrip()[:1] != b"{":
        return FileTokenizer(tiktoken_spec(read_ranks(raw, path)))
    try:
        spec = json.loads(raw)
        tokenizers.Tokenizer.from_str(raw.decode())
        return FileTokenizer(spec)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # noqa: BLE001  the library raises bare Exception, and panics, which are not even that
        raise ConfigError(f"data.tokenizer: {path} is not a Hugging Face tokenizer.json that can be used here: {error}") from None


def _valid(text: str) -> str:
    """Lone surrogates, which JSON can hold and UTF-8 can not, become question marks, and HIDDEN U+FFFD."""
    return text.encode("utf-8", "replace").decode().replace(HIDDEN, "\ufffd")


def _vocabulary(model: dict) -> dict[str, int]:
    vocab = model["vocab"]
    return vocab if isinstance(vocab, dict) else {piece: i for i, (piece, _) in enumerate(vocab)}


def _with_specials(spec: dict) -> dict:
    """A copy of the spec in which every one of Kimi's special tokens exists, missing ones behind all other ids."""
    spec = copy.deepcopy(spec)
    spec["truncation"] = spec["padding"] = None
    known = {token["content"] for token in spec.setdefault("added_tokens", [])}
    vocabulary = _vocabulary(spec["model"])
    taken = [*vocabulary.values(), *(token["id"] for token in spec["added_tokens"])]
    missing = {name: max(taken) + 1 + i for i, name in enumerate(name for name in SPECIAL_NAMES if name not in known)}
    missing |= {name: vocabulary[name] for name in missing if name in vocabulary}
    spec["added_tokens"] += added_tokens(missing)
    if isinstance(spec["model"]["vocab"], dict):
        spec["model"]["vocab"] |= missing  # readers number added tokens by the size of this table otherwise
    return spec


def _byte_level(spec: dict) -> bool:
    return "ByteLevel" in json.dumps(spec.get("decoder"))


def _text_names(spec: dict) -> set[str]:
    """The added tokens that stand for text: runs of spaces and tabs, which GPT-NeoX, CodeGen and Phi have behind the rest, and
    Gemma among its pieces, where a space is written as U+2581."""
    space = " " if _byte_level(spec) else "\u2581"
    return {
        token["content"]
        for token in spec["added_tokens"]
        if not token["special"] and token["content"].replace(space, " ").isspace()
    }


def _without_added(spec: dict) -> dict:
    """A copy that reads plain text only: no control token is looked for, and none can be reached as a piece. Pieces stand
    behind control tokens, so none begins the text: what a file puts before the text's first word only stays away. Readers
    number added tokens as they come, so beside a list of pieces the hidden ones keep their places."""
    spec = _prefixed_nowhere(copy.deepcopy(spec))
    kept, model = _text_names(spec), spec["model"]
    names = {token["content"] for token in spec["added_tokens"]} - kept - {model.get("unk_token")}
    spec["post_processor"] = None
    if isinstance(model["vocab"], dict):
        spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] in kept]
        model["vocab"] = {piece: i for piece, i in model["vocab"].items() if piece not in names}
        model["vocab"] |= {token["content"]: token["id"] for token in spec["added_tokens"]}
        if "merges" in model:  # of a piece that is no more nothing is made, and it is made of nothing
            skip = len(model.get("continuing_subword_prefix") or "")
            pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
            model["merges"] = [[a, b] for a, b in pairs if not {a, b, a + b[skip:]} & names]
    else:
        spec["added_tokens"] = [
            token if token["content"] in kept else token | {"content": HIDDEN + token["content"], "normalized": False}
            for token in spec["added_tokens"]
        ]
        model["vocab"] = [[HIDDEN + piece if piece in names else piece, score] for piece, score in model["vocab"]]
    return spec


def _prefixed_nowhere(part: Any) -> Any:
    """Parts of a tokenizer.json in which `prepend_scheme: first` has become `never`."""
    if isinstance(part, list):
        return [_prefixed_nowhere(item) for item in part]
    if not isinstance(part, dict):
        return part
    if part.get("prepend_scheme") == "first":
        return part | {"prepend_scheme": "never"}
    return {key: value if key in ("model", "added_tokens") else _prefixed_nowhere(value) for key, value in part.items()}


LETTER_HEAD = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
LETTER_TAIL = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
LEAD, SHORT_FORM = r"[^\r\n\p{L}\p{N}]?", r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
KIMI_PATTERN = "|".join(
    [
        r"[\p{Han}]+",
        f"{LEAD}{LETTER_HEAD}*{LETTER_TAIL}+{SHORT_FORM}",
        f"{LEAD}{LETTER_HEAD}+{LETTER_TAIL}*{SHORT_FORM}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
"""How Kimi K2 cuts text before byte pairs are merged: Han runs by themselves, else like OpenAI's newer tokenizers. Only
this very expression gives the ids of the released model."""

KIMI_RESERVED = 256
KIMI_OFFSETS = {
    tok.BOS: 0,
    tok.EOS: 1,
    tok.IM_END: 2,
    tok.IM_USER: 3,
    tok.IM_ASSISTANT: 4,
    tok.EOT: 9,
    tok.IM_SYSTEM: 10,
    tok.CALLS_BEGIN: 11,
    tok.CALLS_END: 12,
    tok.CALL_BEGIN: 13,
    tok.CALL_ARGUMENT: 14,
    tok.CALL_END: 15,
    tok.IM_MIDDLE: 17,
    tok.THINK: 22,
    tok.THINK_END: 23,
    tok.UNK: 254,
    tok.PAD: 255,
}
"""Kimi K2's special ids, counted from the end of the ranks (163,584 in the released file)."""


def read_ranks(raw: bytes, path: Path) -> list[bytes]:
    """Tokens in rank order of a tiktoken file (`BASE64 RANK` lines, dense from 0). ConfigError names a bad line."""
    tokens = []
    for number, line in enumerate(raw.splitlines(), start=1):
        try:
            text, rank = line.split()
            tokens.append(base64.b64decode(text, validate=True))
            dense = int(rank) == len(tokens) - 1
        except (ValueError, binascii.Error):
            raise ConfigError(
                f"data.tokenizer: {path} line {number} is no tiktoken line (BASE64 RANK), and the file is no tokenizer.json"
            ) from None
        if not dense:
            raise ConfigError(f"data.tokenizer: {path} line {number} has rank {rank.decode()}, expected {len(tokens) - 1}")
    missing = set(range(256)) - {token[0] for token in tokens if len(token) == 1}
    if missing:
        raise ConfigError(f"data.tokenizer: {path} has no token for byte {min(missing)}")
    return tokens


def tiktoken_spec(tokens: list[bytes]) -> dict:
    """tokenizer.json of byte-pair ranks. Every way to join two tokens into a third is a merge at the third's rank, as
    tiktoken merges; a piece that is a token is taken whole."""
    char = byte_characters()
    spell = {token: "".join(char[byte] for byte in token) for token in tokens}
    rank = {token: i for i, token in enumerate(tokens)}
    merges = []
    for token in tokens:
        parts = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        parts = sorted((rank[a], rank[b], a, b) for a, b in parts if a in rank and b in rank)
        merges += [[spell[a], spell[b]] for _, _, a, b in parts]
    end = len(tokens)
    special = {name: end + offset for name, offset in KIMI_OFFSETS.items()}
    reserved = {f"<|reserved_token_{i}|>": i for i in range(end, end + KIMI_RESERVED) if i not in special.values()}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": KIMI_PATTERN}, "behavior": "Isolated", "invert": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added_tokens(special | reserved),
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
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
            "ignore_merges": True,
            "vocab": {spell[token]: i for token, i in rank.items()} | special | reserved,
            "merges": merges,
        },
    }
