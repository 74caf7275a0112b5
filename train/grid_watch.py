"""What a step did to the experts on their grid, as far as its report says it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from configs.param_spec import Specs
from configs.schema import QuantConfig
from quant.coverage import group_axis
from quant.error import grid_error
from quant.grid import LEVELS
from quant.metrics import CodeHistory, code_flow, codes_of


class GridWatch:
    """Distance of the masters from the grid, and how codes move in the steps that are reported.

    Movement is followed in the first MoE layer only: it needs two bytes per weight. A run without a grid may have widths
    that no group divides; of those nothing is measured.
    """

    def __init__(self, specs: Specs, quant: QuantConfig):
        grid = {"specs": specs, "group": quant.group_size, "levels": LEVELS.get(quant.grid, LEVELS["int4"])}

        def first_layer(params):
            return {path: params[path][:1] for path, spec in specs.items() if spec.on_grid}

        def after(history, params):
            history, moved = code_flow(history, first_layer(params), **grid)
            return history, grid_error(params, **grid) | moved

        self.history = None
        on_grid = [spec.shape[group_axis(spec)] for spec in specs.values() if spec.on_grid]
        self.measures = not any(inputs % quant.group_size for inputs in on_grid)
        self._codes = jax.jit(lambda params: codes_of(first_layer(params), **grid))
        self._after = jax.jit(after, donate_argnums=0)

    def rehearse(self, params: dict[str, Any]) -> None:
        """Compile both halves, so that the first report waits for neither."""
        self.before(params)
        self.report(params)
        self.history = None

    def before(self, params: dict[str, Any]) -> None:
        """The weights that the next step, a reported one, will change."""
        if not self.measures:
            return
        codes = self._codes(params)
        self.history = CodeHistory(codes, self.history.moved if self.history else jax.tree.map(jnp.zeros_like, codes))

    def report(self, params: dict[str, Any]) -> dict[str, Any]:
        """Of the weights after it: grid_error, codes_at_edge, quant/flipped, quant/oscillating."""
        if not self.measures:
            return {}
        self.history, measured = self._after(self.history, params)
        return measured
