"""What happened to a tensor whose bytes are no longer those that were exported.

Hypotheses are tried in turn: the tensor is undone under each and hashed; the recorded hash proves the one that fits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from quant.evidence import Fingerprint, digest, word_sums, words_of
from quant.pack import PER_WORD, pack, unpack
from quant.tensor_file import DTYPES, Checkpoint

AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Position in an AWQ word of the code that lies j-th in ours."""

Undo = Callable[[np.ndarray], np.ndarray]


def cause(checkpoint: Checkpoint, name: str, recorded: dict[str, Fingerprint], now: dict[str, Fingerprint]) -> str:
    """One clause for a changed tensor."""
    was, is_ = recorded[name], now[name]
    if is_.dtype != was.dtype or is_.shape != was.shape:
        return f"it was {was.dtype} {list(was.shape)} and is {is_.dtype} {list(is_.shape)}"
    owner = next((other for other, mark in recorded.items() if mark.sha256 == is_.sha256 and other != name), None)
    if owner is not None:
        swapped = owner in now and now[owner].sha256 == was.sha256
        return f"it holds the values of {owner}" + (", and the other way round: the two are swapped" if swapped else "")
    data = checkpoint.raw(name)
    values = np.frombuffer(data, DTYPES[is_.dtype]).reshape(is_.shape)
    for sentence, undo in _rearrangements(name, values, checkpoint):
        if digest(np.ascontiguousarray(undo(values)).tobytes()) == was.sha256:
            return sentence
    if not np.any(words_of(data)):
        return "all its values were set to zero"
    if is_.total == was.total:
        return "the same 32-bit words lie in another order"
    return _single_word(data, values, was) or "no known rearrangement explains it: several values were changed"


def _single_word(data: bytes, values: np.ndarray, was: Fingerprint) -> str | None:
    """Word i changed by d: the sums differ by d and by i * d."""
    words = words_of(data)
    total, weighted = word_sums(words)
    d = total - was.total
    shift = (weighted - was.weighted + 2**63) % 2**64 - 2**63
    if d == 0 or shift % d or not 0 <= shift // d < len(words):
        return None
    at = shift // d
    before = int(words[at]) - d
    if not 0 <= before < 2**32:
        return None
    restored = words.copy()
    restored[at] = before
    if digest(restored.tobytes()[: len(data)]) != was.sha256:
        return None
    per_row = values.shape[-1] * values.itemsize / 4 if values.ndim > 1 else 0
    place = f"word {at}" + (f" (row {int(at // per_row)})" if per_row else "")
    bits = int(words[at]) ^ before
    if bits.bit_count() == 1:
        return f"bit {bits.bit_length() - 1} of {place} is flipped"
    return f"only {place} changed, from {before:#010x} to {int(words[at]):#010x}"


def _rearrangements(name: str, values: np.ndarray, checkpoint: Checkpoint) -> Iterator[tuple[str, Undo]]:
    yield "the bytes of every value are in reverse order", lambda v: v.view(f"u{v.itemsize}").byteswap()
    yield "every value has the opposite sign", lambda v: -v
    if values.ndim != 2:
        yield "the values are in reverse order", lambda v: v[::-1]
        return
    if name.endswith(".weight_packed"):
        yield from _nibble_orders()
        scale = name.removesuffix("weight_packed") + "weight_scale"
        if scale in checkpoint and len(checkpoint.shape(scale)) == 2:
            groups = checkpoint.shape(scale)[1]
            yield "the groups of every row are in reverse order", lambda v: _groups(v, groups)[:, ::-1].reshape(v.shape)
            yield ("the groups of every row are shifted by one", lambda v: np.roll(_groups(v, groups), -1, 1).reshape(v.shape))
            yield (
                "the groups of every row are shifted back by one",
                lambda v: np.roll(_groups(v, groups), 1, 1).reshape(v.shape),
            )
    for what, axis in (("rows", 0), ("columns", 1)):
        yield f"the {what} are in reverse order", lambda v, axis=axis: np.flip(v, axis)
        yield f"the {what} are shifted by one", lambda v, axis=axis: np.roll(v, -1, axis)
        yield f"the {what} are shifted back by one", lambda v, axis=axis: np.roll(v, 1, axis)
    yield "it is stored transposed", lambda v: v.reshape(v.shape[::-1]).T


def _groups(words: np.ndarray, groups: int) -> np.ndarray:
    return words.reshape(words.shape[0], groups, -1)


def _nibble_orders() -> Iterator[tuple[str, Undo]]:
    def reorder(order: list[int]) -> Undo:
        def undo(words):
            codes = unpack(words)
            return pack(codes.reshape(-1, PER_WORD)[:, order].reshape(codes.shape))

        return undo

    yield "the nibbles of every word are in reverse order", reorder([7, 6, 5, 4, 3, 2, 1, 0])
    yield "the nibbles of every byte are exchanged", reorder([1, 0, 3, 2, 5, 4, 7, 6])
    yield "the nibbles are in AWQ's interleaved order", reorder([AWQ_ORDER.index(j) for j in range(PER_WORD)])
    yield "the nibbles are in the inverse of AWQ's order", reorder(list(AWQ_ORDER))
    yield "the nibbles are in two's complement instead of offset by 8", lambda v: v ^ np.int32(-0x77777778)
