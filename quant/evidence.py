"""What an export says about itself, so that damage which breaks no rule of the format is found: `evidence.json`.

Swapped projections, permuted groups, flipped bits leave a perfectly formed file. Each tensor therefore has a hash,
which tells that something changed, and two sums over its words, which often tell what: one is blind to their order, and
together they locate a single changed word. The probe ties the weights to the function: log-probabilities
of a few token rows. The files that decide what becomes of text before and after the network have a hash each.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

FILE = "evidence.json"
CHUNK = 1 << 22
"""Words summed at a time."""


@dataclass(frozen=True)
class Fingerprint:
    """Of a tensor's bytes as they lie in the file, read as 32-bit words w_i (the last one padded with zeros).

    total     sum of w_i
    weighted  sum of i * w_i, modulo 2**64
    """

    dtype: str
    shape: tuple[int, ...]
    sha256: str
    total: int
    weighted: int

    @classmethod
    def of(cls, dtype: str, shape: tuple[int, ...], data: bytes | memoryview) -> Fingerprint:
        total, weighted = word_sums(words_of(data))
        return cls(dtype, tuple(shape), digest(data), total, weighted)

    @classmethod
    def from_json(cls, row: list) -> Fingerprint:
        return cls(row[0], tuple(row[1]), *row[2:])

    def to_json(self) -> list:
        return [self.dtype, list(self.shape), self.sha256, self.total, self.weighted]


@dataclass(frozen=True)
class Probe:
    """Token rows [N, S] and the model's log-probability of each next token, [N, S-1] float32."""

    tokens: np.ndarray
    logprobs: np.ndarray

    @classmethod
    def of(cls, tokens: np.ndarray, logits: np.ndarray) -> Probe:
        """From token rows [N, S] and their float32 logits [N, S, V]."""
        logits = np.asarray(logits, np.float64)[:, :-1]
        top = logits.max(-1, keepdims=True)
        logprobs = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
        chosen = np.take_along_axis(logprobs, np.asarray(tokens)[:, 1:, None], -1)[..., 0]
        return cls(np.asarray(tokens), chosen.astype(np.float32))


def digest(data: bytes | memoryview) -> str:
    return hashlib.sha256(data).hexdigest()


def words_of(data: bytes | memoryview) -> np.ndarray:
    """uint32 words of some bytes, little-endian."""
    data = memoryview(data)
    return np.frombuffer(data if len(data) % 4 == 0 else bytes(data) + bytes(-len(data) % 4), "<u4")


def word_sums(words: np.ndarray) -> tuple[int, int]:
    total, weighted = 0, 0
    for start in range(0, len(words), CHUNK):
        part = words[start : start + CHUNK].astype(np.uint64)
        total += int(part.sum())
        weighted += int((part * np.arange(start, start + len(part), dtype=np.uint64)).sum())
    return total, weighted % 2**64


def record(
    tensors: Mapping[str, Fingerprint], config: Mapping[str, Any], files: Mapping[str, str], probe: Probe | None
) -> dict[str, Any]:
    """The content of evidence.json; `files` are the SHA-256 of files that hold neither tensors nor the config, by name."""
    content: dict[str, Any] = {
        "version": 1,
        "config": dict(config),
        "files": dict(sorted(files.items())),
        "tensors": {name: tensors[name].to_json() for name in sorted(tensors)},
    }
    if probe is not None:
        content["probe"] = {"tokens": probe.tokens.tolist(), "next_token_logprobs": probe.logprobs.tolist()}
    return content
