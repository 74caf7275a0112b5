"""From stored arrays to a Hugging Face directory that inference engines serve at four bits.

One tensor is in memory at a time. The directory is written under a temporary name and renamed when it is complete,
so a failed export leaves nothing behind and an existing directory is never touched.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from configs.param_spec import Specs
from configs.schema import ConfigError, ModelConfig, QuantConfig
from quant import evidence
from quant.codecs import KIMI7, Encoded, jitted
from quant.hf_config import generation_config, write_config
from quant.layout import Slot, all_slots
from quant.model_card import model_card
from quant.pack import PER_WORD, pack
from quant.source import LastBlock, WeightSource
from quant.tensor_file import NAMES, Writer

SHARD_BYTES = 4 * 2**30
"""A file is closed when the next projection would pass this size."""

BF16 = np.dtype(ml_dtypes.bfloat16)
F32, I32 = np.dtype("<f4"), np.dtype("<i4")

Quantizer = Callable[[Slot, np.ndarray, int], Encoded]
"""(slot, its weight [out, in], group) -> codes and scales; how post-training baselines reach the same files."""

Table = dict[str, tuple[np.dtype, tuple[int, ...]]]


class SavesTokenizer(Protocol):
    def save(self, directory: Path) -> None:
        """Write tokenizer.json, tokenizer_config.json and what else a reader needs."""


@dataclass(frozen=True)
class ExportSummary:
    """What was written."""

    directory: Path
    files: int
    tensors: int
    bytes: int
    quantized_weights: int
    weights: int

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.bytes / self.weights


def tensor_table(slot: Slot, model: ModelConfig, quant: QuantConfig) -> Table:
    """Names, dtypes and shapes that one slot becomes in the checkpoint: itself, or the three parts of a packed one."""
    if not (slot.spec.on_grid and quant.grid != "none"):
        return {slot.name: (_plain_dtype(slot, model), slot.shape)}
    out, inputs = slot.shape
    if inputs % quant.group_size or inputs % PER_WORD:
        divisor = math.lcm(quant.group_size, PER_WORD)
        raise ConfigError(
            f"{slot.name} has {inputs} inputs, which cannot be packed: a width must be a multiple of {divisor} "
            f"(quant.group_size={quant.group_size}, and {PER_WORD} codes to a word); --format bf16 has no such rule"
        )
    stem = slot.name.removesuffix(".weight")
    return {
        f"{stem}.weight_packed": (I32, (out, inputs // PER_WORD)),
        f"{stem}.weight_scale": (BF16, (out, inputs // quant.group_size)),
        f"{stem}.weight_shape": (I32, (2,)),
    }


def _plain_dtype(slot: Slot, model: ModelConfig) -> np.dtype:
    return F32 if slot.spec.served == "float32" or model.dtype == "float32" else BF16


_nearest = jitted(KIMI7)


def on_kimi_grid(slot: Slot, weight: np.ndarray, group: int) -> Encoded:
    """Codes [out, in] and scales [out, in/group] of the training grid; the default Quantizer."""
    return _nearest(weight, -1, group)


def encode(
    slot: Slot, block: np.ndarray, model: ModelConfig, quant: QuantConfig, quantizer: Quantizer = on_kimi_grid
) -> dict[str, np.ndarray]:
    """The tensors of `tensor_table` with their values, from a block of masters."""
    weight = slot.to_hf(block)
    if not (slot.spec.on_grid and quant.grid != "none"):
        plain = np.empty(slot.shape, _plain_dtype(slot, model))
        plain[...] = weight  # rounds and transposes in one pass: no second copy of a large embedding
        return {slot.name: plain}
    codes, scales = quantizer(slot, weight.astype(np.float32), quant.group_size)
    stem = slot.name.removesuffix(".weight")
    return {
        f"{stem}.weight_packed": pack(np.asarray(codes)),
        f"{stem}.weight_scale": np.asarray(scales).astype(BF16),
        f"{stem}.weight_shape": np.array(slot.shape, I32),
    }


def plan_shards(tables: list[Table], limit: int) -> list[list[int]]:
    """Positions in `tables` per file, in order; the parts of one projection never part."""
    shards: list[list[int]] = [[]]
    used = 0
    for at, table in enumerate(tables):
        size = sum(math.prod(shape) * dtype.itemsize for dtype, shape in table.values())
        if shards[-1] and used + size > limit:
            shards.append([])
            used = 0
        shards[-1].append(at)
        used += size
    return shards


@contextmanager
def written_whole(target: Path) -> Iterator[Path]:
    """A path in a hidden directory beside `target`; what the block writes there, a file or a directory, becomes `target` when it
    ends. After an error, Ctrl-C or SIGTERM nothing is left; the last two are a KeyboardInterrupt that says so."""

    def stop(number: int, _frame: Any) -> None:
        ignore()
        raise KeyboardInterrupt(signal.Signals(number).name)

    def ignore() -> None:  # a second signal must not break off what the first one, or the end, cleans up
        for number in before:
            signal.signal(number, signal.SIG_IGN)

    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    in_main = threading.current_thread() is threading.main_thread()  # others may set no handlers, and get no signals
    before = {number: signal.getsignal(number) for number in ((signal.SIGINT, signal.SIGTERM) if in_main else ())}
    try:
        for number in before:
            signal.signal(number, stop)
        yield scratch / target.name
        os.rename(scratch / target.name, target)
    except KeyboardInterrupt as stopped:
        raise KeyboardInterrupt(f"{target} was not written: the export was stopped by {stopped}") from None
    finally:
        ignore()
        shutil.rmtree(scratch, ignore_errors=True)
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


def export_model(
    weights: WeightSource,
    specs: Specs,
    model: ModelConfig,
    quant: QuantConfig,
    out_dir: str | Path,
    *,
    tokenizer: SavesTokenizer | None = None,
    report: Mapping[str, Any] | None = None,
    rounded: bool = False,
    probe: evidence.Probe | None = None,
    progress: Callable[[int, int], None] | None = None,
    quantizer: Quantizer = on_kimi_grid,
    shard_bytes: int = SHARD_BYTES,
) -> ExportSummary:
    """Write `out_dir`: safetensors with index, config and generation config, tokenizer, README.md, evidence.json.

    weights   masters, read one block at a time
    report    measured numbers for the model card, label -> value
    rounded   the card says that training did not see these weights
    probe     token rows with the log-probabilities the exported weights must reproduce
    progress  called with (tensors written, tensors in all)
    quantizer gives codes and scales of an expert's projection; the training grid unless a baseline is exported

    Raises ConfigError where `out_dir` exists, the disk is too small, or a width is not divisible by the group.
    """
    out_dir = Path(out_dir)
    if out_dir.exists():
        raise ConfigError(f"{out_dir} exists; export to a new directory or remove it first")
    slots = all_slots(specs)
    tables = [tensor_table(slot, model, quant) for slot in slots]
    total = sum(math.prod(shape) * dtype.itemsize for table in tables for dtype, shape in table.values())
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(out_dir.parent).free
    if total > free:
        raise ConfigError(f"the export needs {total / 2**30:.1f} GiB, but {out_dir.parent} has {free / 2**30:.1f} GiB free")

    with written_whole(out_dir) as partial_dir:
        partial_dir.mkdir()
        _write_json(partial_dir / "generation_config.json", generation_config(model))
        if tokenizer is not None:
            tokenizer.save(partial_dir)
        files = {path.name: evidence.digest(path.read_bytes()) for path in partial_dir.iterdir() if path.is_file()}
        source = LastBlock(weights)
        marks, index = _write_tensors(
            slots,
            tables,
            plan_shards(tables, shard_bytes),
            partial_dir,
            progress,
            lambda slot: encode(slot, source.read(slot.path, slot.block), model, quant, quantizer),
        )
        summary = ExportSummary(
            out_dir,
            len(set(index.values())),
            len(index),
            total,
            sum(math.prod(s.shape) for s in slots if s.spec.on_grid and quant.grid != "none"),
            sum(math.prod(s.shape) for s in slots),
        )
        _write_json(
            partial_dir / "model.safetensors.index.json",
            {"metadata": {"total_size": total}, "weight_map": dict(sorted(index.items()))},
        )
        config = write_config(model, quant)
        _write_json(partial_dir / "config.json", config)
        _write_json(partial_dir / evidence.FILE, evidence.record(marks, config, files, probe))
        (partial_dir / "README.md").write_text(model_card(model, quant, summary, report or {}, rounded))
    return summary


def _write_tensors(
    slots: list[Slot],
    tables: list[Table],
    shards: list[list[int]],
    directory: Path,
    progress: Callable[[int, int], None] | None,
    tensors_of: Callable[[Slot], dict[str, np.ndarray]],
):
    """Every file, tensor by tensor; returns {tensor: fingerprint} and {tensor: file}."""
    marks: dict[str, evidence.Fingerprint] = {}
    index: dict[str, str] = {}
    for number, members in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):06}.safetensors"
        with Writer(directory / file, {name: row for at in members for name, row in tables[at].items()}) as writer:
            for at in members:
                for name, array in tensors_of(slots[at]).items():
                    marks[name] = evidence.Fingerprint.of(NAMES[array.dtype], array.shape, writer.write(name, array))
                    index[name] = file
                if progress is not None:
                    progress(at + 1, len(slots))
    return marks, index


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
