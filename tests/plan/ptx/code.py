"""The text of a kernel to functions of a warp, one for each instruction."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from tests.plan.ptx.engines import ENGINES
from tests.plan.ptx.machine import ARRAYS, DESCRIPTORS, SHARED_AT, known
from tests.plan.ptx.registers import arithmetic


def parse(text: str, plain: list[int]) -> list[tuple[str, Callable]]:
    """The instructions of a kernel whose parameters are pointers to the `plain` arguments and, of Mosaic's, the descriptors."""
    text = re.sub(r"//[^\n]*", "", text)
    head, body = text.split("{", 1)
    parameters = re.findall(r"\w+_param_\d+", head)
    known(len(parameters) - len(plain) in (0, 1), f"parameters {parameters} for arguments {plain}")
    symbols = dict(zip(parameters, [(n + 1) * ARRAYS for n in plain] + [DESCRIPTORS]))
    symbols |= dict.fromkeys(("__dynamic_shmem__0", "global_smem"), SHARED_AT)
    body = re.sub(r"^\s*\.(loc|file|section|reg|shared|pragma).*$", "", body.split("$L__func_end0")[0], flags=re.M)
    # A product, and the loop around try_wait, come as a block of their own: what is left is the instruction in it.
    body = re.sub(r"\{\s*\.reg \.pred p; setp\.ne\.b32 p, 1, 0;(.*?;)\s*\}", r"\1", body)
    body = re.sub(r"\{\s*LAB_WAIT:\s*(mbarrier.try_wait[^;]*;).*?DONE:\s*\}", r"\1", body, flags=re.S)
    body = re.sub(r"^\s*[{}]\s*$", "", body, flags=re.M)
    statements, labels = [], {}
    for label, statement in re.findall(r"(\$\w+):|([^;:]+(?:::[^;:]+)*);", body):
        if label:
            labels[label] = len(statements)
        elif statement.strip():
            statements.append(" ".join(statement.split()))
    return [decode(statement, number + 1, labels, symbols) for number, statement in enumerate(statements)]


def decode(statement: str, after: int, labels: dict[str, int], symbols: dict[str, int]) -> tuple[str, Callable]:
    """(operation, function of a warp). The function may return a condition to wait for, a branch where to go on."""
    guard, operation, rest = re.fullmatch(r"(?:@(!?%p\d+) )?([\w.:]+) ?(.*)", statement).groups()
    holds = guard and (lambda warp: ~warp.registers[guard[1:]] if guard[0] == "!" else warp.registers[guard])
    if operation in ("bra", "bra.uni"):

        def jump(warp):
            taken = holds(warp) if guard else np.ones(32, bool)
            known(taken.all() or not taken.any(), f"lanes disagree at {statement}")
            return labels[rest] if taken.all() else after

        return "bra", jump
    operands = re.findall(r"\{[^}]*\}|\[[^]]*\]|[^,{\[\s]+", rest)
    if operation == "ret" or operation.startswith(NOTHING):
        return operation, lambda warp: None
    if operation.startswith("ld.param"):
        operation, operands = "mov.b64", [operands[0], operands[1].strip("[]")]
    for beginning, build in ENGINES.items():
        if operation.startswith(beginning):
            return operation, build(operation, operands, holds or (lambda warp: np.ones(32, bool)), symbols)
    known(not guard, f"a guard on {statement}")
    return operation, arithmetic(operation, operands, symbols)


NOTHING = "prefetch", "setmaxnreg", "fence.mbarrier_init", "griddepcontrol", "bar.warp.sync"
"""Without effect here: a warp's lanes go together."""
