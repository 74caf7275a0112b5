"""Which mesh axes split which logical axis of a parameter: one table, read by those who place arrays and by the layers
that gather them again."""

from __future__ import annotations

import math
from collections.abc import Mapping

from configs.param_spec import ParamSpec
from configs.schema import ConfigError, ModelConfig, require

AXES = ("data", "fsdp", "expert", "context", "tensor")
"""Of every mesh, outermost first: `data` crosses slices, `tensor` joins neighbours."""

ROW_AXES = ("data", "fsdp", "expert")
"""Mesh axes that split the rows of a batch; `context` splits the positions of a row."""

TOKEN_AXES = (*ROW_AXES, "context")
"""Mesh axes along which devices hold different tokens."""

Rules = Mapping[str, tuple[tuple[str, ...], ...]]
Partition = tuple[tuple[str, ...], ...]
"""The mesh axes that split each dimension of an array, major first; () where it is whole."""

_STORAGE = (
    ("fsdp", "expert", "context"),
    ("fsdp", "context"),
    ("fsdp", "expert"),
    ("fsdp",),
    ("expert", "context"),
    ("expert",),
    ("context",),
)

RULES: Rules = {
    "experts": (("expert", "fsdp", "context"), ("expert", "fsdp"), ("expert",)),
    "heads": (("tensor",), *_STORAGE),
    "hidden": (("tensor",),),
    "vocab": (("tensor",),),
    "embed": _STORAGE,
    "expert_hidden": (("tensor",), *_STORAGE),
    "q_latent": _STORAGE,
    "kv_norm": _STORAGE,
}
"""Logical axis -> mesh axes, best first; the first choice that divides and is still free in the array is taken.

Experts take fsdp and context too where they divide, and heads where tensor leaves them: their Newton-Schulz then needs
no communication. Experts' hidden widths are stored in parts where parts of their inputs would cut groups of the grid
(GROUP). What tensor splits stays split in the forward pass; so do experts over `expert`; everything else is stored in
parts and gathered at its use. Axes not named here are never split. Earlier entries choose first. Vectors are whole
everywhere: gathering one would take longer than reading it."""

GROUP = 32
"""Weights with one scale on the grid that engines read. Inputs of matrices on the grid are stored in multiples of it; parts that
cut the groups of another quant.group_size are refused where the grid is laid over them."""

REPLICATED_LIMIT = 1 << 22
"""Elements above which a part of an array that could be split further is an error."""


def partition(spec: ParamSpec, sizes: Mapping[str, int], rules: Rules = RULES) -> Partition:
    """How an array is split over mesh axes of these sizes. ConfigError for a rule that names an axis twice or one that
    no mesh has, and for a large array that the rules leave on many devices."""
    chosen: dict[str, tuple[str, ...]] = {}
    vector = len(set(spec.axes) - {"layers"}) == 1
    for logical, choices in rules.items():
        if logical in spec.axes and not vector:
            size, used = spec.shape[spec.axis(logical)], {axis for axes in chosen.values() for axis in axes}
            grouped = spec.on_grid and logical == spec.matrix.rows[0] and size % GROUP == 0
            chosen[logical] = _first_that_fits(logical, size, size // GROUP if grouped else size, choices, sizes, used)
    out = tuple(chosen.get(axis, ()) for axis in spec.axes)
    _require_small_parts(spec, out, sizes)
    return out


def _first_that_fits(
    logical: str, size: int, units: int, choices: Partition, sizes: Mapping[str, int], used: set[str]
) -> tuple[str, ...]:
    """Of the choices with axes that the mesh has and no other dimension uses, the first that divides the `units` that storage
    leaves whole, or `size` where the axis is tensor."""
    for axes in choices:
        require(
            set(axes) <= set(AXES),
            f"the sharding rule {logical} -> {axes} names an axis that no mesh has; there are {', '.join(AXES)}",
        )
        require(
            len(set(axes)) == len(axes),
            f"the sharding rule {logical} -> {axes} uses a mesh axis twice on one tensor; name each axis once",
        )
        present = tuple(axis for axis in axes if sizes[axis] > 1)
        parts = size if "tensor" in present else units
        if present and parts % math.prod(sizes[axis] for axis in present) == 0 and not used & set(present):
            return present
    return ()


def _require_small_parts(spec: ParamSpec, found: Partition, sizes: Mapping[str, int]) -> None:
    used = {axis for axes in found for axis in axes}
    part = spec.size // math.prod(sizes[axis] for axis in used)
    idle = [axis for axis in ("fsdp", "expert") if sizes[axis] > 1 and axis not in used]
    if not used and any(sizes[axis] > 1 for axis in ("context", "tensor")):
        idle += [axis for axis in ("context", "tensor") if sizes[axis] > 1]
    if idle and part > REPLICATED_LIMIT:
        raise ConfigError(
            f"{spec.hf[0].name} {spec.shape} would be replicated over mesh.{' and mesh.'.join(idle)}: none of "
            f"its axes {spec.axes} divides over them; change the mesh {dict(sizes)} or the width"
        )


def check_model(model: ModelConfig, sizes: Mapping[str, int]) -> None:
    """ConfigError, with the fix, where a mesh axis cannot split what it is for."""

    def divisors(value: int) -> str:
        return f"the sizes that can: {', '.join(str(n) for n in range(2, min(value, 4096) + 1) if value % n == 0) or 1}"

    expert, tensor = sizes["expert"], sizes["tensor"]
    require(
        model.n_routed_experts % expert == 0,
        f"mesh.expert={expert} does not divide model.n_routed_experts={model.n_routed_experts}; "
        + divisors(model.n_routed_experts),
    )
    for name in ("num_attention_heads", "intermediate_size", "moe_intermediate_size", "vocab_size"):
        width = getattr(model, name)
        require(width % tensor == 0, f"mesh.tensor={tensor} does not divide model.{name}={width}; " + divisors(width))


def check_positions(seq_len: int, sizes: Mapping[str, int]) -> None:
    """ConfigError unless every device of the context axis gets two chunks of a row."""
    parts = 2 * sizes["context"]
    require(
        sizes["context"] == 1 or seq_len % parts == 0,
        f"train.seq_len={seq_len} cannot be cut into the {parts} chunks of mesh.context={sizes['context']}; "
        f"the nearest that can: {max(round(seq_len / parts), 1) * parts}",
    )
