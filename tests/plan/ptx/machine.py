"""A block of warps with its shared memory, barriers and copies."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

SHARED, SHARED_AT = 1 << 18, 1024
"""Bytes of shared memory, a few more than there are, and where the kernel's part begins."""
SPOILED = 0xFF
"""In every byte: a NaN in each of our formats."""
ARRAYS, DESCRIPTORS = 1 << 40, 1 << 60
"""Argument n begins at address (n + 1) * ARRAYS, descriptors at DESCRIPTORS, 128 bytes each."""


class Hazard(Exception):
    """What goes wrong on a GPU."""


def check(holds, what: str, error: type[Exception] = Hazard) -> None:
    if not holds:
        raise error(what)


known = partial(check, error=NotImplementedError)


@dataclass(frozen=True)
class Descriptor:
    """A TMA descriptor: part of which argument of the kernel, [sizes] with strides in elements, by boxes."""

    argument: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    swizzle: int


def swizzled(places: np.ndarray) -> np.ndarray:
    return places ^ (places >> 7 & 7) << 4


class Barrier:
    def __init__(self, count: int):
        self.count = self.missing = count
        self.phase = self.bytes = 0

    def arrive(self, times: int, expected: int = 0) -> None:
        self.missing -= times
        self.bytes += expected
        check(self.missing >= 0, "more arrivals at a barrier than it has room for")
        if self.missing == self.bytes == 0:
            self.phase, self.missing = self.phase + 1, self.count


class Groups:
    """What was issued and is not done: groups, and one that is still open."""

    def __init__(self):
        self.whole, self.open = [], []

    def commit(self) -> None:
        self.whole.append(self.open)
        self.open = []

    def wait(self, left: int) -> None:
        while len(self.whole) > left:
            for work in self.whole.pop(0):
                work()


class Warp:
    def __init__(self, block: Block, number: int):
        self.block, self.number = block, number
        self.registers: dict[str, np.ndarray] = {}
        self.unready: set[str] = set()
        self.unfenced: list[np.ndarray] = []
        self.products, self.copies, self.loads = Groups(), Groups(), Groups()

    def set(self, name: str, value: np.ndarray) -> None:
        value = np.ascontiguousarray(value)
        self.registers[name] = value if value.dtype == bool else value.view(f"u{value.itemsize}")
        self.unready.add(name)

    def write(self, places: np.ndarray, values: np.ndarray) -> None:
        self.block.seen.view(values.dtype)[places // values.itemsize] = values
        self.unfenced.append(places // 4)

    def run(self, instructions, chance: random.Random):
        """Yields None or a condition to wait for, whenever another warp may go on."""
        at, turn = 0, 0
        while at < len(instructions) and instructions[at][0] != "ret":
            operation, step = instructions[at]
            result = step(self)
            at = result if operation == "bra" else at + 1
            turn -= 1
            if operation != "bra" and result is not None:
                yield result
            elif turn < 0:
                turn = chance.randrange(60)
                yield None


class Block:
    def __init__(self, warps: int, descriptors: list[Descriptor], arrays, times, place, late: bool):
        self.descriptors, self.arrays, self.times, self.place, self.late = descriptors, arrays, times, place, late
        self.warps = warps
        self.seen = np.full(SHARED, SPOILED, np.uint8)
        self.engines = self.seen.copy()
        self.barriers: dict[int, Barrier] = {}
        self.meetings: dict[int, Barrier] = {}
        self.coming: list[Callable] = []

    def run(self, instructions, chance: random.Random) -> None:
        warps = [Warp(self, number) for number in range(self.warps)]
        running = {warp.number: warp.run(instructions, chance) for warp in warps}
        waiting = dict.fromkeys(running)
        while running or self.coming:
            able = [number for number in running if waiting[number] is None or waiting[number]()]
            check(able or self.coming, "deadlock")
            if self.coming and (not able or chance.random() < 0.05):
                self.coming.pop(chance.randrange(len(self.coming)))()
            elif able:
                number = chance.choice(able)
                try:
                    waiting[number] = next(running[number])
                except StopIteration:
                    del running[number]
        for warp in warps:
            check(not any((*warp.products.whole, warp.products.open)), "a product is never waited for")
            warp.copies.commit()
            warp.copies.wait(0)
        check(not any(barrier.bytes for barrier in self.barriers.values()), "bytes that never came")

    def array(self, where: int) -> np.ndarray:
        return self.arrays[where // ARRAYS - 1].reshape(-1).view(np.uint8)

    def box(self, descriptor: Descriptor, corner: list[int], shared: int):
        """(elements of the array, which of them exist, their bytes in shared memory [n, itemsize])."""
        known(descriptor.swizzle in (16, 128), f"a box swizzled by {descriptor.swizzle} bytes")
        check(shared % (1024 if descriptor.swizzle == 128 else 128) == 0, "misaligned box")
        axes = np.ix_(*(at + np.arange(size) for at, size in zip(corner, descriptor.box, strict=True)))
        exists = sum(((i < 0) | (i >= size)).astype(int) for i, size in zip(axes, descriptor.sizes, strict=True)) == 0
        elements = sum(i * stride for i, stride in zip(axes, descriptor.strides, strict=True))
        size = self.arrays[descriptor.argument].itemsize
        places = shared + np.arange(exists.size * size)
        places = swizzled(places) if descriptor.swizzle == 128 else places
        return np.where(exists, elements, 0).reshape(-1), exists.reshape(-1), places.reshape(-1, size)

    def load_box(self, descriptor, corner, shared: int, full: int) -> None:
        elements, exists, places = self.box(descriptor, corner, shared)
        memories = self.seen, self.engines
        for memory in memories:
            memory[places] = SPOILED

        def arrive():
            array = self.arrays[descriptor.argument].reshape(-1)
            values = np.where(exists, array.view(f"u{array.itemsize}")[elements], 0).astype(f"u{array.itemsize}")
            for memory in memories:
                memory[places] = values.view(np.uint8).reshape(places.shape)
            self.barriers[full].arrive(0, -places.size)

        self.coming.append(arrive)

    def store_box(self, descriptor, corner, shared: int) -> None:
        elements, exists, places = self.box(descriptor, corner, shared)
        array = self.arrays[descriptor.argument].reshape(-1)
        values = self.engines[places].reshape(-1).view(f"u{array.itemsize}")
        array.view(f"u{array.itemsize}")[elements[exists]] = values[exists]
        self.times[descriptor.argument].reshape(-1)[elements[exists]] += 1

    def store(self, where: np.ndarray, values: np.ndarray) -> None:
        """Values of threads to one array."""
        if not len(where):
            return
        number = int(where[0]) // ARRAYS - 1
        self.array(int(where[0])).view(values.dtype)[where % ARRAYS // values.itemsize] = values
        size = self.arrays[number].itemsize
        elements = (where % ARRAYS)[:, None] // size + np.arange(max(values.itemsize // size, 1))
        np.add.at(self.times[number].reshape(-1), elements, 1)

    def store_bytes(self, where: int, shared: int, count: int) -> None:
        check(where % 16 == shared % 16 == count % 16 == 0, "misaligned bytes")
        number, first = where // ARRAYS - 1, where % ARRAYS
        self.array(where)[first : first + count] = self.engines[shared : shared + count]
        size = self.arrays[number].itemsize
        self.times[number].reshape(-1)[first // size : (first + count) // size] += 1
