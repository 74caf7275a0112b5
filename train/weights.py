"""Weights to look at, by a name on the command line: a run's masters, a run's grid weights, or an exported directory."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
from jaxtyping import Array

from configs.platforms import platform_of
from configs.schema import ConfigError, ModelConfig
from data.chat_template import template_settings
from data.render import Mode
from data.tokenizer import Tokenizer, load_tokenizer
from model.decode.generate import Decoder
from model.decode.sampling import GREEDY, Sampling
from model.decode.served_params import serve
from model.transformer import param_specs
from quant.importer import Imported
from quant.read_config import read_config
from quant.resident import Int4Weight
from quant.served import Serving
from train.baselines import BASELINES, baseline
from train.console import console
from train.run_data import data_of
from train.run_dir import split_source
from train.session import fastest_dtype, load_params, open_to_look, parse_source

KINDS = ("bf16", "int4", *BASELINES)


@dataclass(frozen=True)
class Weights:
    """What a forward pass needs; `params` are as served (model/decode/served_params.py), so nothing is rounded again. Experts may
    be an Int4Weight (quant/resident.py). `system` and `mode` are those of the conversations it was trained on."""

    name: str
    model: ModelConfig
    params: dict[str, Array | Int4Weight]
    tokenizer: Tokenizer
    dtype: str
    platform: str
    system: str | None = None
    mode: Mode = "interleaved"

    def decoder(self, rows: int, sampling: Sampling = GREEDY, positions: int = 0) -> Decoder:
        """Rows that go on with these weights."""
        stops = {*self.tokenizer.stop_ids, self.model.eos_token_id, *self.model.stop_token_ids}
        return Decoder(
            self.model,
            self.params,
            rows,
            stop_ids=tuple(sorted(stops)),
            dtype=self.dtype,
            platform=self.platform,
            vocab_size=self.tokenizer.vocab_size,
            sampling=sampling,
            positions=positions,
        )


def load_weights(source: str, dtype: str | None = None) -> Weights:
    """RUN[@STEP][:bf16|int4|BASELINE] or an exported DIR[:bf16|int4]; `dtype` to compute in, default the run's or the fastest.

    bf16   the masters rounded to bf16. int4: the masters on the grid, which is what is exported (the default of a run
           trained on the grid). A post-training baseline of the masters: a name of
           train/baselines.py

    Of a directory int4 keeps the experts packed in memory, bf16 unpacks them; see `load_export` for the default.
    """
    match = re.fullmatch(rf"(.+?)(?::({'|'.join(KINDS)}))?", source)
    if match is None:
        raise ConfigError(f"{source!r} names no weights; give a run directory or an exported one")
    where, kind = match[1], match[2]
    directory = split_source(where)[0].path
    if (directory / "checkpoints").is_dir():
        return _from_run(source, where, kind, dtype)
    if any(directory.glob("*.safetensors")):
        if kind in BASELINES:
            raise ConfigError(f"{source}: an exported directory has no masters to apply {kind} to; leave out :{kind}")
        return load_export(directory if kind is None else Path(where), dtype, packed=None if kind is None else kind == "int4")
    before, colon, ending = where.rpartition(":")
    if colon and Path(before.partition("@")[0]).is_dir():
        raise ConfigError(f"{source}: {ending!r} is no kind of weights; write one of {', '.join(KINDS)} behind the colon")
    raise ConfigError(f"{where} is neither a run directory (no checkpoints/) nor an exported one (no safetensors file)")


def load_arms(arms: Sequence[str], taken: Sequence[str] = ()) -> list[tuple[str, Weights]]:
    """Weights by name: each arm is NAME=WEIGHTS, or WEIGHTS, which then are the name as well. ConfigError if two have one name,
    or one has a name that is `taken`."""
    named = [tuple(arm.split("=", 1)) if "=" in arm else (arm, arm) for arm in arms]
    names = [*taken, *(name for name, _ in named)]
    for arm, (name, source) in zip(arms, named):
        if not name:
            raise ConfigError(f"the arm {arm!r} has no name; write NAME=WEIGHTS")
        if names.count(name) > 1:
            raise ConfigError(f"two arms are named {name}, and one would take the other's place; write NEW={source}")
    return [(name, load_weights(source)) for name, source in named]


def _from_run(source: str, where: str, kind: str | None, dtype: str | None) -> Weights:
    run, step = parse_source(where)
    session = open_to_look(run, dtype)
    cfg = session.cfg
    params, _ = load_params(session, run, step)
    kind = kind or ("int4" if cfg.quant.grid != "none" else "bf16")
    if kind in BASELINES:
        arm = baseline(session, params, kind, partial(data_of, session, run))
        params = arm.fake(params, session.specs)
        for note in arm.notes:
            console.print(f"{source}: {note}", markup=False)
    serving = Serving(cfg.model.dtype, cfg.quant.rounding_grid if kind == "int4" else "none", cfg.quant.group_size)
    served = serve(params, session.specs, serving, 1.0, session.compute_dtype)
    return Weights(
        source, cfg.model, served, session.tokenizer, session.compute_dtype, session.platform, cfg.data.system, cfg.data.mode
    )


def load_export(directory: Path, dtype: str | None = None, packed: bool | None = False) -> Weights:
    """An exported directory, computing in `dtype` (default: what this machine multiplies fastest).

    packed  experts stay at four bits in memory; None: where that is no slower, which is off a CPU
    """
    config = read_config(directory)
    specs = param_specs(config.model)
    files = Imported(directory, specs, prefix=config.prefix)
    dtype = dtype or fastest_dtype()
    if packed and not files.packed:
        raise ConfigError(f"{directory} is not INT4, so there are no codes to keep; leave out :int4")
    packed = jax.default_backend() != "cpu" if packed is None else packed
    at_four_bits = {path: files.int4(path) for path in files.packed if packed and specs[path].on_grid}
    dense = {path: spec for path, spec in specs.items() if path not in at_four_bits}
    params = {path: jnp.asarray(files.region(path)) for path in dense}
    served = serve(params, dense, Serving(config.model.dtype, "none"), 0.0, dtype) | at_four_bits
    return Weights(
        str(directory),
        config.model,
        served,
        _tokenizer(directory, config.model),
        dtype,
        platform_of(jax.devices()[0]),
        **template_settings(directory),
    )


def tokenizer_file(directory: Path) -> str | None:
    """The tokenizer that lies beside a directory's weights, as `load_tokenizer` takes it."""
    return next((str(directory / name) for name in ("tokenizer.json", "tiktoken.model") if (directory / name).exists()), None)


def _tokenizer(directory: Path, model: ModelConfig) -> Tokenizer:
    tokenizer = load_tokenizer(tokenizer_file(directory) or "bytes")
    # Networks pad their vocabulary; an untrained one may well produce such an id, which then decodes as unknown.
    tokenizer.vocab_size = max(tokenizer.vocab_size, model.vocab_size)
    return tokenizer
