"""What a compiled program multiplies and moves, read from its HLO text: the tests' and benchmarks' witness.

`compiled.cost_analysis()` counts the body of a loop once; here a body counts as often as its known trip count says.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

COLLECTIVES = ("all-to-all", "all-gather", "all-reduce", "reduce-scatter", "collective-permute", "ragged-all-to-all",
               "collective-broadcast")

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4,
          "s64": 8, "u64": 8, "f64": 8}
_SHAPE = re.compile(r"\b([a-z]+[0-9]*)\[([0-9,]*)\]")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (.*)$")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.-]+) .*\{$")


@dataclass(frozen=True)
class Collective:
    """bytes: size of its result on one device. group: devices that take part. in_loop: inside a while body."""

    kind: str
    bytes: int
    group: int
    in_loop: bool

    @property
    def received(self) -> int:
        """Bytes one device receives, by the usual ring counts."""
        others = (self.group - 1) / self.group
        share = {"all-reduce": 2 * others, "reduce-scatter": self.group - 1, "collective-permute": 1.0}
        return round(self.bytes * share.get(self.kind, others))


@dataclass(frozen=True)
class Census:
    """Of one device's program. flops: of matrix products, multiply and add counted apart."""

    flops: int
    collectives: tuple[Collective, ...]

    @property
    def received(self) -> int:
        return sum(c.received for c in self.collectives)

    def kinds(self, over_bytes: int = 0) -> dict[str, int]:
        """How often each kind of collective occurs with a result of more than `over_bytes`."""
        out: dict[str, int] = {}
        for c in self.collectives:
            if c.bytes > over_bytes:
                out[c.kind] = out.get(c.kind, 0) + 1
        return out


def _shapes(text: str) -> list[tuple[str, tuple[int, ...]]]:
    return [(d, tuple(int(n) for n in dims.split(",") if n)) for d, dims in _SHAPE.findall(text) if d in _BYTES]


def _size(text: str) -> int:
    return sum(_BYTES[d] * math.prod(dims) for d, dims in _shapes(text))


def _numbers(line: str, key: str) -> list[int]:
    found = re.search(key + r"=\{([0-9,]*)\}", line)
    return [int(n) for n in found.group(1).split(",") if n] if found else []


def _group_size(line: str, devices: int) -> int:
    """The three ways to write replica groups: lists, an iota, or mesh axes; none at all means every device."""
    if listed := re.search(r"replica_groups=\{\{([0-9,]+)\}", line):
        return len(listed.group(1).split(","))
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]", line):
        return int(iota.group(2))
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", line):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh.group(1))}
        axes = mesh.group(2).split(",") if mesh.group(2).strip() else list(sizes)
        return math.prod(sizes[axis.strip().strip("'")] for axis in axes)
    return devices


def census(hlo: str, devices: int = 1) -> Census:
    """Count an optimised HLO module. ValueError if a loop with products or collectives has no known trip count."""
    computations: dict[str, list[tuple[str, str]]] = {}
    entry, current = None, None
    for line in hlo.splitlines():
        header = _HEADER.match(line)
        if header and not line.startswith(" "):
            current = computations.setdefault(header.group(2), [])
            entry = header.group(2) if header.group(1) else entry
        elif current is not None and (found := _INSTRUCTION.match(line)):
            current.append(found.groups())

    def walk(name: str, in_loop: bool) -> tuple[int, list[Collective]]:
        flops, moved = 0, []
        results = {}
        for result, body in computations[name]:
            found = re.search(r"(?:^|[\s)])([a-z][\w-]*)\(", body)
            kind = found.group(1) if found else ""
            results[result] = body[:found.start(1)] if found else body
            base = kind.removesuffix("-start")
            if kind == "dot":
                left = re.search(r"dot\((?:[^%]*?)%?([\w.-]+)", body).group(1)
                dims = _shapes(results[left])[0][1]
                contracted = math.prod(dims[i] for i in _numbers(body, "lhs_contracting_dims"))
                flops += 2 * contracted * math.prod(_shapes(results[result])[0][1])
            elif base in COLLECTIVES:
                moved.append(Collective(base, _size(results[result]), _group_size(body, devices), in_loop))
            elif kind == "while":
                inner, collectives = walk(re.search(r"body=%?([\w.-]+)", body).group(1), True)
                trips = re.search(r'known_trip_count[^0-9]*(\d+)', body)
                if (inner or collectives) and not trips:
                    raise ValueError(f"the trip count of loop {result} is not known")
                count = int(trips.group(1)) if trips else 0
                flops += count * inner
                moved += collectives * count
            else:
                for called in re.findall(r"(?:calls|to_apply|branch_computations)=\{?%?([\w.-]+)", body):
                    inner, collectives = walk(called, in_loop)
                    flops, moved = flops + inner, moved + collectives
        return flops, moved

    flops, moved = walk(entry, False)
    return Census(flops, tuple(moved))
