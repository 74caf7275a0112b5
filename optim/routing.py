"""Which rule updates which array, and as which matrices: the table that `plan` prints and a checkpoint remembers."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

from configs.param_spec import Specs
from configs.schema import ConfigError, OptimConfig
from optim.matrices import MatrixLayout
from optim.muon import matrix_scale

LAYOUT_VERSION = 1
"""Of the optimizer state; raised when stored arrays change meaning."""


@dataclass(frozen=True)
class Route:
    """A row of the routing table. `matrices`: (count, m, n) of every block, empty unless the rule is muon."""

    path: str
    shape: tuple[int, ...]
    rule: str
    matrices: tuple[tuple[int, int, int], ...]
    preset: str
    scales: tuple[float, ...]

    def cells(self) -> tuple[str, ...]:
        """Path, stored shape, logical matrices, rule, preset, scale; as printed."""
        return (
            self.path,
            "x".join(map(str, self.shape)),
            " + ".join(f"{count} x {m}x{n}" for count, m, n in self.matrices),
            self.rule,
            self.preset,
            " / ".join(f"{s:.4g}" for s in self.scales),
        )


def rules(specs: Specs, cfg: OptimConfig) -> dict[str, str]:
    """Rule of every path. ConfigError if none is left for Muon although it is asked for, or if a rule is unknown."""
    out = {}
    for path, spec in specs.items():
        if spec.update not in ("muon", "adamw", "router_bias"):
            raise ConfigError(
                f"{path} asks for the update rule {spec.update!r}, which nobody offers; use muon, adamw or router_bias"
            )
        out[path] = "adamw" if spec.update == "muon" and cfg.matrices == "adamw" else spec.update
    if cfg.matrices == "muon" and "muon" not in out.values():
        raise ConfigError(
            "optim.matrices is muon, but not one parameter declares a matrix for it; "
            "check the specs or set optim.matrices to adamw"
        )
    return out


def routing_table(specs: Specs, cfg: OptimConfig) -> list[Route]:
    """One row per stored array, in the order of the specs."""
    table = []
    for path, rule in rules(specs, cfg).items():
        spec = specs[path]
        matrices = MatrixLayout.of(spec, cfg.split_kv_a).matrices(spec.shape) if rule == "muon" else []
        table.append(
            Route(
                path,
                spec.shape,
                rule,
                tuple(matrices),
                f"{cfg.newton_schulz} x{cfg.newton_schulz_steps}" if matrices else "",
                tuple(matrix_scale(cfg.matrix_scale, m, n) for _, m, n in matrices),
            )
        )
    return table


def fingerprint(specs: Specs, cfg: OptimConfig) -> int:
    """A number (int32) that differs when optimizer state cannot be carried over: another layout version, other
    arrays, or another rule for one of them. The mesh and the plan do not enter: they are free to change."""
    rows = [(LAYOUT_VERSION, path, specs[path].shape, rule) for path, rule in sorted(rules(specs, cfg).items())]
    return zlib.crc32(repr(rows).encode()) & 0x7FFFFFFF
