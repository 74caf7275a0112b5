"""What an export says about itself, so that damage which breaks no rule of the format is found: `evidence.json`.

Swapped projections, permuted groups, flipped bits leave a perfectly formed file. The hash of every tensor's bytes
tells that something changed, and tried again under a hypothesis (another tensor's hash, nibbles reversed, ...) often
what. The probe ties the weights to the function: log-probabilities of a few token rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

FILE = "evidence.json"


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
    """Hash of a tensor's bytes as they lie in the file."""
    return hashlib.sha256(data).hexdigest()


def record(hashes: Mapping[str, str], probe: Probe | None) -> dict[str, Any]:
    """The content of evidence.json."""
    content: dict[str, Any] = {"version": 1, "sha256": dict(sorted(hashes.items()))}
    if probe is not None:
        content["probe"] = {"tokens": probe.tokens.tolist(), "next_token_logprobs": probe.logprobs.tolist()}
    return content
