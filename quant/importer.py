"""A Hugging Face directory as stored arrays: bf16, f32, or INT4 pack-quantized, one block at a time.

The directory is a WeightSource, so it can be exported again, compared, or loaded into any sharding without ever being
in memory as a whole. Everything is checked when it is opened: nothing is written before a missing or misshapen tensor
is known.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from configs.param_spec import Specs
from configs.schema import ConfigError
from quant.coverage import group_axis
from quant.findings import Report
from quant.layout import Slot, all_slots
from quant.packed import PARTS, projections
from quant.resident import Int4Weight
from quant.tensor_file import Checkpoint
from quant.verify_files import check_index
from quant.verify_values import grid_of, is_fixed_point

READABLE = ("BF16", "F32")
"""Dtypes whose values a float32 master holds and a served weight returns unchanged."""

GRID_NAMES = {"kimi7": "absmax/7", "ct75": "absmax/7.5 (codes down to -8)", "other": "no absmax grid"}


class Imported:
    """Weights of a directory, by the paths of the ParamSpec table.

    skipped   tensors that are recognised and not part of the network, by what they are: {reason: names}
    packed    stored arrays that were INT4 in the file
    """

    def __init__(self, directory: str | Path, specs: Specs, *, prefix: str = "", trained_groups: int | None = None):
        """Opens and checks every tensor's name, shape and dtype.

        prefix          before every tensor name, as read_config reports it
        trained_groups  training goes on with the experts on the grid in groups of this size. Refused then: experts that are not
                        packed so, and when they are read, codes that are no fixed point of that grid, because training would
                        start from other weights than the file serves

        Raises ConfigError naming file and tensor; DamagedFile for a truncated file.
        """
        self.checkpoint, self.specs, self._prefix, self._groups = Checkpoint(directory), specs, prefix, trained_groups
        index = Report()
        check_index(self.checkpoint, index)
        for finding in index.of("error"):
            raise ConfigError(finding.message)
        self._packed = projections(self.checkpoint)
        self._slots: dict[tuple[str, tuple[int, ...]], list[Slot]] = defaultdict(list)
        used: set[str] = set()
        for slot in all_slots(specs):
            self._slots[slot.path, slot.block].append(slot)
            used |= self._check(slot)
        layers = {layer for spec in specs.values() for layer in spec.layers}
        self.skipped = self._unused(used, max(layers, default=-1))
        self.packed = sorted({s.path for slots in self._slots.values() for s in slots if self._stem(s) in self._packed})

    def _stem(self, slot: Slot) -> str:
        return self._prefix + slot.name.removesuffix(".weight")

    def _check(self, slot: Slot) -> set[str]:
        """Names of the slot's tensors; raises where they cannot be what the network needs."""
        stem, name = self._stem(slot), self._prefix + slot.name
        parts = {f"{stem}.{part}" for part in PARTS}
        if name in self.checkpoint:
            entry, where = self.checkpoint.tensors[name], self.checkpoint.files[name]
            if entry.dtype not in READABLE:
                raise ConfigError(f"{where}: {name} is {entry.dtype}; convert the checkpoint to bf16, f32 or INT4 groups first")
            shape, names = entry.shape, {name}
        elif stem in self._packed:
            shape, names = self._packed[stem].shape, parts
            where = self.checkpoint.files[f"{stem}.weight_packed"]
            if f"{stem}.weight_shape" not in self.checkpoint:
                raise ConfigError(f"{where}: {stem} lacks weight_shape")
        elif parts & self.checkpoint.tensors.keys():
            raise ConfigError(f"{stem} is packed, but its words and scales do not fit together; run verify on the directory")
        else:
            raise ConfigError(f"{self.checkpoint.directory.name} has no tensor {name}; the checkpoint is incomplete")
        if self._groups and slot.spec.on_grid:
            group = self._packed[stem].group if stem in self._packed else None
            if group != self._groups:
                found = f"has groups of {group}" if group else f"is {self.checkpoint.tensors[name].dtype}"
                raise ConfigError(
                    f"{where}: {name} {found}, but config.json says INT4 in groups of {self._groups}; they do not belong together"
                )
        if shape != slot.shape:
            raise ConfigError(f"{where}: {name} has shape {list(shape)}, but config.json implies {list(slot.shape)}")
        return names

    def _unused(self, used: set[str], last_layer: int) -> dict[str, list[str]]:
        skipped: dict[str, list[str]] = defaultdict(list)
        for name in sorted(self.checkpoint.tensors.keys() - used):
            reason = self._why_unused(name, last_layer)
            if reason is None:
                raise ConfigError(
                    f"{self.checkpoint.files[name]}: {name} is no tensor of this network; the config and the "
                    "weights do not belong together"
                )
            skipped[reason].append(name)
        return dict(skipped)

    def _why_unused(self, name: str, last_layer: int) -> str | None:
        """A layer behind the last one is multi-token prediction if it joins two hidden states (arXiv 2412.19437, 2.2)."""
        if not name.startswith(self._prefix):
            return "outside the language model"
        parts = name.removeprefix(self._prefix).split(".")
        if parts[-1] == "inv_freq":
            return "rope frequencies, which follow from config.json"
        if parts[:2] != ["model", "layers"] or len(parts) < 4 or not parts[2].isdecimal() or int(parts[2]) <= last_layer:
            return None
        joins = f"{self._prefix}model.layers.{parts[2]}.eh_proj.weight" in self.checkpoint
        return f"multi-token prediction, layer {parts[2]}" if joins else None

    def _tensor(self, slot: Slot) -> np.ndarray:
        """Values in the checkpoint's orientation, float32, all of them finite."""
        stem = self._stem(slot)
        name = f"{stem}.weight_scale" if stem in self._packed else self._prefix + slot.name
        values = self._unpacked(slot) if stem in self._packed else self.checkpoint.read(name).astype(np.float32)
        if not np.isfinite(values).all():
            raise ConfigError(
                f"{self.checkpoint.files[name]}: {name} holds NaN or infinity; the file was damaged, or written "
                "by a run that had diverged"
            )
        return values

    def _unpacked(self, slot: Slot) -> np.ndarray:
        stem = self._stem(slot)
        projection = self._packed[stem]
        if self._groups and slot.spec.on_grid:
            codes, scales = projection.codes(self.checkpoint), projection.scales(self.checkpoint).astype(np.float32)
            if not is_fixed_point(codes, scales):
                raise ConfigError(
                    f"{stem} lies on {GRID_NAMES[grid_of(codes, scales)]}: the training grid would change its weights "
                    "at the first step, so training cannot continue from this file; import the bf16 masters instead"
                )
        return projection.values(self.checkpoint)

    def int4(self, path: str) -> Int4Weight:
        """A packed array as it lies in the file, codes and scales; one layer of it is in the host's memory at a time.

        Raises ConfigError where scales are not bf16, which is what Int4Weight holds.
        """
        layers = [self.int4_layer(path, n) for n in sorted({block[0] for other, block in self._slots if other == path})]
        return jax.tree.map(lambda *parts: jnp.concatenate(parts), *layers)

    def int4_layer(self, path: str, number: int) -> Int4Weight:
        """[1, ...]: one layer of it."""
        spec, blocks = self.specs[path], (b for other, b in self._slots if other == path and b[0] == number)
        codes, scales = jax.tree.map(
            lambda *experts: jnp.asarray(np.stack(experts))[None], *(self._encoded(path, block) for block in blocks)
        )
        group = spec.shape[group_axis(spec)] // scales.shape[group_axis(spec)]
        return Int4Weight(codes.astype(jnp.int4), scales, group_axis(spec), group)

    def _encoded(self, path: str, block: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        """Codes (int8) and scales (bf16) of one block in stored layout."""
        spec = self.specs[path]
        codes = np.empty(spec.shape[len(block) :], np.int8)
        scales = np.empty(codes.shape, ml_dtypes.bfloat16)
        for slot in self._slots[path, block]:
            projection = self._packed[self._stem(slot)]
            stored = projection.scales(self.checkpoint)
            if stored.dtype != scales.dtype:
                raise ConfigError(
                    f"{projection.stem} has scales in {stored.dtype}, and only bf16 ones are kept at four "
                    "bits; leave :int4 out, or write the scales as bf16"
                )
            slot.into(projection.codes(self.checkpoint), codes)
            slot.into(np.repeat(stored, projection.group, axis=1), scales)
        return codes, scales.take(range(0, codes.shape[group_axis(spec)], projection.group), group_axis(spec))

    def read(self, path: str, index: tuple[int, ...]) -> np.ndarray:
        """`array[index]` as float32; `index` may stop short of the block's axes."""
        return self.region(path, tuple(slice(i, i + 1) for i in index))[(0,) * len(index)]

    def region(self, path: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """`array[index]` as float32, from the blocks it touches only; what `jax.make_array_from_callback` asks for."""
        shape = self.specs[path].shape
        full = tuple(range(n)[cut] for n, cut in itertools.zip_longest(shape, index, fillvalue=slice(None)))
        lead = next(len(block) for other, block in self._slots if other == path)
        rest = tuple(slice(r.start, r.stop, r.step) for r in full[lead:])
        out = np.empty([len(r) for r in full], np.float32)
        for at in itertools.product(*(range(len(r)) for r in full[:lead])):
            block = np.empty(shape[lead:], np.float32)
            for slot in self._slots[path, tuple(r[i] for r, i in zip(full, at, strict=False))]:
                slot.into(self._tensor(slot), block)
            out[at] = block[rest]
        return out
