"""From a run's settings to its batches. Batch `step` is a pure function of the settings; Grain only fetches ahead.

Batch: a dict of [B, S] arrays.
    tokens, targets   int32
    weights           float32, of each target's loss; the step divides by their sum over the whole batch
    positions         int32, counted from 0 in every piece
    segments          int32, 0 for padding, 1.. for the pieces of a row; attention stays inside one
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import grain
import numpy as np
from absl import flags

from configs.schema import ConfigError, RunConfig
from data.arrays import write_array_record
from data.chat import Account
from data.documents import Documents, Piece, Shelf
from data.intake import read_documents
from data.mixture import MixedStream
from data.render import KimiRenderer
from data.streams import DocumentStream, RowStream, TaskStream
from data.tokenizer import Tokenizer

Batch = dict[str, np.ndarray]

TASK_VALIDATION_BATCHES = 8
"""Held-out batches of an endless task when the run asks for all."""
HELDOUT_SEED = 0
"""Held-out batches are the same for every data.seed, so that runs can be compared."""
PLAN_VERSION = 3
"""Of the order of rows; a run goes on only with the one it was started with. 2: data/packing.py:completed; larger windows
of built-in problems. 3: results without ids go to the call of their function; `functions` are declared; thoughts that stand
twice are trained once; no built-in problem is both trained and held out; held-out documents belong to the plan; arguments
of calls are written anew."""


def assemble(rows: list[list[Piece]], seq_len: int, pad_id: int) -> Batch:
    """Lay the pieces of each row side by side."""
    shape = len(rows), seq_len
    batch = {
        "tokens": np.full(shape, pad_id, np.int32),
        "targets": np.full(shape, pad_id, np.int32),
        "weights": np.zeros(shape, np.float32),
        "positions": np.zeros(shape, np.int32),
        "segments": np.zeros(shape, np.int32),
    }
    for b, row in enumerate(rows):
        at = 0
        for segment, piece in enumerate(row, start=1):
            here = slice(at, at + len(piece.weights))
            batch["tokens"][b, here] = piece.ids[:-1]
            batch["targets"][b, here] = piece.ids[1:]
            batch["weights"][b, here] = piece.weights
            batch["positions"][b, here] = np.arange(len(piece.weights))
            batch["segments"][b, here] = segment
            at = here.stop
    return batch


class Data:
    """The batches of a run; see `open_data`."""

    def __init__(
        self,
        cfg: RunConfig,
        tokenizer: Tokenizer,
        renderer: KimiRenderer,
        train: RowStream,
        heldout: RowStream | None,
        heldout_rows: int,
        account: Account,
        facts: dict[str, Any],
        heldout_print: str = "",
    ):
        self.tokenizer, self.renderer = tokenizer, renderer
        self.account = account
        self.batch_size, self.seq_len = cfg.train.batch_size, cfg.train.seq_len
        self._train, self._facts = train, facts
        self._heldout_stream, self._heldout_rows = heldout, heldout_rows
        plan = {
            "version": PLAN_VERSION,
            "seed": cfg.data.seed,
            "batch": self.batch_size,
            "seq_len": self.seq_len,
            "tokenizer": tokenizer.fingerprint(),
            "rows": train.fingerprint(),
            "heldout": heldout_print,
        }
        self.plan_hash = hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()[:16]

    def batch(self, step: int, rows: slice = slice(None)) -> Batch:
        """The global batch of a step, or a host's contiguous `rows` of it. Every row trains a token."""
        numbers = range(step * self.batch_size, (step + 1) * self.batch_size)[rows]
        return assemble([self._train.row(r) for r in numbers], self.seq_len, self.tokenizer.pad_id)

    def iterate(self, start_step: int = 0, rows: slice = slice(None), workers: int = 0) -> Iterator[Batch]:
        """Batches from `start_step` on, fetched ahead by threads (workers=0) or worker processes."""
        steps = grain.MapDataset.range(start_step, 1 << 40).map(_Fetch(self, rows))
        ahead = steps.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4))
        if workers:
            if not flags.FLAGS.is_parsed():  # Grain reads a flag of its own, which only absl programs have parsed
                flags.FLAGS.mark_as_parsed()
            ahead = ahead.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
        return iter(ahead)

    @property
    def holds_out(self) -> bool:
        """Whether there are held-out rows."""
        return self._heldout_rows > 0

    @cached_property
    def _heldout(self) -> list[list[Piece]]:
        """All held-out rows, made when they are first asked for: a run starts sooner."""
        return [self._heldout_stream.row(r) for r in range(self._heldout_rows)]

    def validation(self, limit: int = 0) -> list[Batch]:
        """Held-out batches in a fixed order, the last filled up with padding rows; `limit` 0 takes all."""
        size = self.batch_size
        starts = range(0, self._heldout_rows, size)[: limit or None]
        return [
            assemble(self._heldout[at : at + size] + [[]] * (at + size - len(self._heldout)), self.seq_len, self.tokenizer.pad_id)
            for at in starts
        ]

    def source_bytes(self, batch: Batch) -> int:
        """UTF-8 bytes that the trained targets stand for: bits per byte = sum(weight * nll) / ln 2 / this."""
        return int(self.tokenizer.byte_lengths[batch["targets"]][batch["weights"] > 0].sum())

    def describe(self) -> dict[str, Any]:
        """What is trained on, in numbers."""
        return (
            self._facts
            | self._train.describe()
            | self.account.summary()
            | {"heldout_rows": self._heldout_rows, "plan_hash": self.plan_hash}
        )


class _Fetch(grain.transforms.Map):
    """Step number -> batch; a class, so that worker processes can receive it."""

    def __init__(self, data: Data, rows: slice):
        self.data, self.rows = data, rows

    def map(self, step: int) -> Batch:
        return self.data.batch(int(step), self.rows)


def open_data(cfg: RunConfig, tokenizer: Tokenizer, earlier_mixtures: Sequence[tuple[int, Sequence[float]]] = ()) -> Data:
    """Read and tokenise the sources of a run (or set up its built-in task). ConfigError says what cannot be used.

    earlier_mixtures   (step until which it held, weights) of every data.mixture that the run had before this one
    """
    _check_tokenizer(cfg, tokenizer)
    renderer = KimiRenderer(tokenizer, cfg.data.system)
    if not cfg.data.paths:
        train = TaskStream(cfg.data, cfg.train.seq_len, renderer, "train")
        held = TaskStream(replace(cfg.data, seed=HELDOUT_SEED), cfg.train.seq_len, renderer, "heldout")
        count = (cfg.train.eval_batches or TASK_VALIDATION_BATCHES) * cfg.train.batch_size
        return Data(cfg, tokenizer, renderer, train, held, count, Account(), {})
    account = Account()
    shelf = read_documents(cfg, renderer, account)
    train = _mixed(cfg, shelf, earlier_mixtures) if cfg.data.mixture else _stream(cfg, _trained(cfg, shelf))
    held = shelf.documents(held=True)
    facts = {"files": account.files, "skipped_files": account.skipped_files}
    texts = {"train_bytes": shelf.text_bytes(held=False), "heldout_bytes": shelf.text_bytes(held=True)}
    facts |= texts if any(texts.values()) else {}  # conversations and ids have none
    stream = DocumentStream(held, cfg.train.seq_len, HELDOUT_SEED) if held else None
    rows = stream.describe()["rows_per_epoch"] if held else 0
    return Data(cfg, tokenizer, renderer, train, stream, rows, account, facts, held.fingerprint() if held else "")


def write_index(cfg: RunConfig, tokenizer: Tokenizer, path: str | Path) -> int:
    """Tokenise all documents of a run's paths, in order, into an ArrayRecord file that later runs open at once.

    Returns their number. Such a run holds out the last documents of the file; the segments of a conversation are
    documents of their own. The file names the tokenizer, and is refused with another. ConfigError as `open_data`, and if the
    file exists or there are no paths.
    """
    _check_tokenizer(cfg, tokenizer)
    if not cfg.data.paths:
        raise ConfigError("data.paths is empty: the built-in tasks need no index")
    if Path(path).exists():
        raise ConfigError(f"{path} exists; remove it or choose another name")
    if not Path(path).parent.is_dir():
        raise ConfigError(f"{path}: there is no folder {Path(path).parent}; make it first")
    everything = replace(cfg, data=replace(cfg.data, validation_fraction=0.0))
    documents = _trained(cfg, read_documents(everything, KimiRenderer(tokenizer, cfg.data.system), Account()))
    return write_array_record(Path(path), documents.rows(), tokenizer.fingerprint())


def _trained(cfg: RunConfig, shelf: Shelf, source: int | None = None) -> Documents:
    """The training documents of all paths or of one. ConfigError if there are none."""
    documents = shelf.documents(held=False, source=source)
    if documents is None:
        paths = cfg.data.paths if source is None else [cfg.data.paths[source]]
        raise ConfigError(
            f"data.paths: {', '.join(paths)}: every row of the training part was left out (see data.bad_rows and "
            f"data.too_long) or has a single token, so there is nothing to predict"
        )
    return documents


def _stream(cfg: RunConfig, documents: Documents, *key: int) -> DocumentStream:
    return DocumentStream(documents, cfg.train.seq_len, cfg.data.seed, *key)


def _mixed(cfg: RunConfig, shelf: Shelf, earlier: Sequence[tuple[int, Sequence[float]]]) -> MixedStream:
    streams = [_stream(cfg, _trained(cfg, shelf, index), index) for index in range(len(cfg.data.paths))]
    firsts = [0, *(step * cfg.train.batch_size for step, _ in earlier)]
    weights = [*(weights for _, weights in earlier), cfg.data.mixture]
    return MixedStream(streams, list(zip(firsts, weights)), cfg.data.seed)


def _check_tokenizer(cfg: RunConfig, tokenizer: Tokenizer) -> None:
    """ConfigError with every model setting that does not fit the tokenizer."""
    right = {f"{name}_token_id": getattr(tokenizer, f"{name}_id") for name in ("bos", "eos", "pad")}
    wrong = {name: value for name, value in right.items() if getattr(cfg.model, name) != value}
    if tokenizer.eos_id in cfg.model.stop_token_ids:  # what ends a message ends a reply, which is all that matters
        wrong.pop("eos_token_id", None)
    if cfg.model.vocab_size < tokenizer.vocab_size:
        wrong["vocab_size"] = tokenizer.vocab_size
    if outside := [i for i in cfg.model.stop_token_ids if not 0 <= i < cfg.model.vocab_size]:
        raise ConfigError(f"model.stop_token_ids names {outside}, outside the model's vocabulary of {cfg.model.vocab_size} ids")
    if wrong:
        settings = " ".join(f"model.{name}={value}" for name, value in wrong.items())
        raise ConfigError(f"the model does not fit the tokenizer {cfg.data.tokenizer}; set {settings}")
