"""How long a collective takes on a machine, and which mesh axes it runs over.

A group of devices is judged by where its members lie: on a torus each axis that they span brings its links, both ways
round where the axis is closed; groups that interleave share the links. Between slices or nodes only the network is left.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jax.sharding import Mesh

from train.plan.census import Collective
from train.plan.topology import Topology

LATENCY = 5e-6
"""Seconds until a collective moves its first byte: a few hops of about a microsecond each, and its launch."""

DIE_TO_DIE = 6
"""Links' worth of bandwidth between the two dies of a tpu7x chip."""


@dataclass(frozen=True)
class Ring:
    """What a group spans in one direction of the machine: `members` distinct places, `rate` bytes per second for a ring
    of them (both directions together), `exchange` bytes per second for an all-to-all's buffer, `link` from one to the next."""

    members: int
    rate: float
    exchange: float
    link: float


class Interconnect:
    """The machine's wires as a mesh uses them."""

    def __init__(self, topology: Topology, mesh: Mesh):
        self.topology, self.mesh = topology, mesh
        self.devices = list(mesh.devices.flat)
        self.places = np.stack(np.unravel_index(np.arange(mesh.size), mesh.devices.shape), axis=-1)
        self._rings = lru_cache(maxsize=None)(self._rings_of)
        self._crossed = lru_cache(maxsize=None)(self._crossed_by)

    def axes(self, members: tuple[int, ...]) -> tuple[str, ...]:
        """Mesh axes along which a group's members differ."""
        places = self.places[[m for m in members if m < len(self.places)]]
        varies = (places != places[:1]).any(axis=0)
        return tuple(name for name, v in zip(self.mesh.axis_names, varies) if v)

    def spanned(self, c: Collective) -> tuple[str, ...]:
        """Mesh axes that a collective goes along."""
        return self._crossed(c.members) if c.kind == "collective-permute" else self.axes(c.members)

    def _crossed_by(self, members: tuple[int, ...]) -> tuple[str, ...]:
        crossed = {axis for pair in _pairs(members) for axis in self.axes(pair)}
        return tuple(name for name in self.mesh.axis_names if name in crossed)

    def seconds(self, c: Collective) -> float:
        """One run of a collective: bytes over the group's wires, and a latency. A permute has to wait for the pair with the
        slowest."""
        if c.kind == "collective-permute":
            between = [self._rings(pair) for pair in _pairs(c.members)]
            slowest = min((max(r.link for r in rings) for rings in between if rings), default=math.inf)
            return LATENCY + c.bytes / slowest if between else 0.0
        rings = self._rings(c.members)
        if c.group == 1 or not rings:
            return 0.0
        if c.kind in ("all-to-all", "ragged-all-to-all"):
            return LATENCY + max(c.bytes * (r.members - 1) / r.members / r.exchange for r in rings)
        # Rings in several directions carry a share each; and what comes along one direction enters through the members of
        # the others together, each at its own rate.
        places = math.prod(r.members for r in rings)
        cut = max((r.members - 1) / r.members / (places / r.members) / r.rate for r in rings)
        others = (c.group - 1) / c.group
        return LATENCY + c.received * max(1 / sum(r.rate for r in rings), cut / others)

    def _rings_of(self, members: tuple[int, ...]) -> tuple[Ring, ...]:
        devices = [self.devices[m] for m in members if m < len(self.devices)]
        chip = self.topology.chip
        if not chip.dimensions:
            nodes = {d.process_index for d in devices}
            inside = len(devices) // len(nodes)
            wire, outside = chip.link * chip.wire, chip.outside * chip.wire
            both = Ring(inside, wire, wire, wire), Ring(len(nodes), outside, outside, outside)
            return tuple(r for r in both if r.members > 1)
        rings = []
        slices = {getattr(d, "slice_index", 0) or 0 for d in devices}
        if len(slices) > 1:
            outside = chip.outside * chip.wire / chip.devices
            rings.append(Ring(len(slices), outside, outside, outside))
        link = chip.link * chip.wire / chip.devices
        if len({d.core_on_chip for d in devices}) > 1:
            dies = DIE_TO_DIE * chip.link * chip.wire
            rings.append(Ring(2, dies, dies, dies))
        for axis in range(chip.dimensions):
            at = sorted({d.coords[axis] for d in devices})
            if len(at) > 1:
                rings.append(self._torus_axis(at, self.topology.shape[axis], link))
        return tuple(rings)

    def _torus_axis(self, at: list[int], size: int, link: float) -> Ring:
        chip = self.topology.chip
        closed = size >= chip.wraps_from and size % chip.wraps_from == 0
        stride = max(min(b - a for a, b in zip(at, at[1:])), 1)  # that many groups share each link
        ways = 2 if closed and len(at) * stride == size else 1
        # All-to-all: half of all bytes cross the middle, 2 * ways links wide: n * B / 4 over ways * 2 * link / 2.
        return Ring(len(at), ways * link / stride, 4 * ways * link / len(at) / stride, link / stride)


def _pairs(members: tuple[int, ...]) -> list[tuple[int, int]]:
    """A permute's sources and targets, but for who sends to itself."""
    return [pair for pair in zip(members[::2], members[1::2]) if pair[0] != pair[1]]
