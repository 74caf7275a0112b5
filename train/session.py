"""What every verb needs before it can work: the mesh, the parameter table, the tokenizer, and weights from a run."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from configs.param_spec import Specs
from configs.schema import ConfigError, MeshConfig, RunConfig
from data.tokenizer import Tokenizer, load_tokenizer
from model.transformer import param_specs
from train import processes
from train.checkpoint import Checkpoints, Restored
from train.console import console
from train.mesh import check_mesh, make_mesh, param_shardings, platform
from train.run_dir import RunDir, split_source


def fastest_dtype() -> str:
    """float32 or bfloat16, whichever this process multiplies faster (a CPU may do either: jax 0.12 uses AMX and
    AVX512-BF16, jax 0.10 emulates). Accelerators always take bfloat16."""
    if jax.default_backend() != "cpu":
        return "bfloat16"

    product, best = jax.jit(jnp.dot), {"float32": float("inf"), "bfloat16": float("inf")}
    for _ in range(12):  # the first of which compiles; in turns, so that what else the machine does slows both
        for dtype in best:
            # Tall enough that both dtypes take all cores: square products take one or two, by chance.
            a, b = jnp.ones((2048, 256), dtype), jnp.ones((256, 1024), dtype)
            start = time.perf_counter()
            product(a, b).block_until_ready()
            best[dtype] = min(best[dtype], time.perf_counter() - start)
    faster = best["bfloat16"] < 0.75 * best["float32"]
    return "bfloat16" if processes.agree(int(faster)) else "float32"


@dataclass(frozen=True)
class Session:
    """A run's config with the things derived from it."""

    cfg: RunConfig
    specs: Specs
    mesh: Mesh
    tokenizer: Tokenizer
    compute_dtype: str

    @property
    def platform(self) -> str:
        return platform(self.mesh)


def open_session(cfg: RunConfig, compute_dtype: str | None = None, mesh: Mesh | None = None) -> Session:
    """Check the config against the tokenizer and the devices. `compute_dtype` overrides "auto" (a resumed run keeps
    the one it was started with); `mesh` takes the place of the config's."""
    tokenizer = load_tokenizer(cfg.data.tokenizer)
    if tokenizer.vocab_size > cfg.model.vocab_size:
        raise ConfigError(
            f"tokenizer {cfg.data.tokenizer} has {tokenizer.vocab_size} ids but model.vocab_size is "
            f"{cfg.model.vocab_size}; set --model.vocab-size {-(-tokenizer.vocab_size // 64) * 64}"
        )
    dtype = compute_dtype or (cfg.train.compute_dtype if cfg.train.compute_dtype != "auto" else fastest_dtype())
    mesh = mesh or make_mesh(cfg.mesh)
    check_mesh(cfg, mesh)
    return Session(cfg, param_specs(cfg.model), mesh, tokenizer, dtype)


def open_to_look(run: RunDir, compute_dtype: str | None = None) -> Session:
    """A run's session on one device, whatever mesh it was trained on: looking at weights (export, verify, eval, generate,
    distort) takes no other."""
    cfg, facts = run.load_config(), run.load_facts()
    if cfg.mesh.data == 0:  # all devices that there were
        others = cfg.mesh.fsdp * cfg.mesh.expert * cfg.mesh.context * cfg.mesh.tensor
        cfg = replace(cfg, mesh=replace(cfg.mesh, data=max(facts.get("devices", 1) // others, 1)))
    mesh = make_mesh(MeshConfig(data=1), jax.local_devices()[:1])
    session = open_session(cfg, compute_dtype or facts.get("compute_dtype"), mesh)
    require_own_tokenizer(run, session.tokenizer)
    return session


def require_own_tokenizer(run: RunDir, tokenizer: Tokenizer) -> None:
    """ConfigError if a run's tokenizer file is no longer the one it was started with; older runs do not know which that was."""
    now = tokenizer.fingerprint()
    if (started := run.load_facts().get("tokenizer", now)) != now:
        raise ConfigError(
            f"{run.load_config().data.tokenizer} has changed since {run.path} was started with it (fingerprint {started} -> "
            f"{now}): its weights know other ids; put the file back as it was"
        )


def parse_source(source: str) -> tuple[RunDir, int | None]:
    """RUN, RUN@STEP, or RUN@grid for the last step before the experts met the grid."""
    run, step = split_source(source)
    if step == "grid":
        return run, run.step_before_grid()
    if step and not step.isdecimal():
        raise ConfigError(f"{source} should be a run directory, RUN@STEP with a whole number, or RUN@grid")
    return run, int(step) if step else None


def say_passed_over(restored: Restored) -> None:
    """Name the checkpoints that are newer than the one that was taken, and damaged."""
    for sentence in restored.damaged:
        console.print(f"{sentence}; going back to step {restored.step}", style="yellow", markup=False)


def load_params(session: Session, run: RunDir, step: int | None = None) -> tuple[dict[str, jax.Array], int]:
    """Master weights of a run's newest sound checkpoint (or of `step`), on the session's mesh and in its dtype; says which
    checkpoints were passed over."""
    shardings = param_shardings(session.specs, session.mesh)
    stored, wanted = run.load_config().optim.master_dtype, session.cfg.optim.master_dtype
    like = {
        path: jax.ShapeDtypeStruct(spec.shape, jnp.float32 if spec.update == "router_bias" else stored, sharding=shardings[path])
        for path, spec in session.specs.items()
    }
    restored = Checkpoints(run.checkpoints).restore({"params": like}, step)
    say_passed_over(restored)
    params = restored.state["params"]
    if stored != wanted:
        params = {path: w if session.specs[path].update == "router_bias" else w.astype(wanted) for path, w in params.items()}
    return params, restored.step
