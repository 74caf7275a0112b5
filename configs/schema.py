"""Every setting of a run, as frozen dataclasses. `launch.py VERB --help` prints this file.

Model fields carry the names of Hugging Face's `deepseek_v3` config, so that a checkpoint's `config.json` and
ours are the same words. The dataclasses check what one field can know about another; errors are `ConfigError`s,
one sentence each.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal

Dtype = Literal["float32", "bfloat16"]

MOST_STEPS = 2**31 - 2
"""Steps are counted in 32 bits with their sign, and one more than the last is a number too."""


class ConfigError(ValueError):
    """A setting that cannot work; the message says which one and what to do."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _in_float32(section: str, config: Any) -> None:
    """What the device computes with is float32: a number outside its range would arrive as 0 or infinity."""
    for each in dataclasses.fields(config):
        value = getattr(config, each.name)
        if isinstance(value, float):
            require(math.isfinite(value), f"{section}.{each.name} must be finite, not {value}")
            require(
                value == 0 or 2.0**-126 <= abs(value) < 2.0**128,
                f"{section}.{each.name} is computed with in float32, which reaches from 1.2e-38 to 3.4e38; {value} does not fit",
            )


def _not_negative(section: str, config: Any, names: str) -> None:
    for name in names.split():
        value = getattr(config, name)
        require(value >= 0, f"{section}.{name} must be a number of 0 or more, not {value}")


@dataclass(frozen=True)
class ModelConfig:
    """A DeepSeek-V3-family network: MLA attention, leading dense layers, then sigmoid-routed MoE layers."""

    vocab_size: int = 320
    """Token ids, special ones included."""
    hidden_size: int = 128
    """Width of the residual stream (D)."""
    num_hidden_layers: int = 4
    """Dense and MoE layers together."""
    first_k_dense_replace: int = 1
    """Leading layers whose feed-forward block is dense."""
    num_attention_heads: int = 4
    """Attention heads (H)."""
    q_lora_rank: int | None = 64
    """Width of the query latent; None projects queries directly (Moonlight)."""
    kv_lora_rank: int = 64
    """Width of the key/value latent (R), the part of the cache that grows with depth."""
    qk_nope_head_dim: int = 32
    """Query/key width per head that carries no position."""
    qk_rope_head_dim: int = 16
    """Query/key width that is rotated by position; the key part is shared by all heads."""
    v_head_dim: int = 32
    """Value width per head."""
    intermediate_size: int = 384
    """Hidden width of the dense feed-forward layers."""
    moe_intermediate_size: int = 128
    """Hidden width of one expert (F)."""
    n_routed_experts: int = 16
    """Routed experts per MoE layer (E)."""
    num_experts_per_tok: int = 4
    """Routed experts per token (K)."""
    n_shared_experts: int = 1
    """Shared experts, stored as one feed-forward block of n times the expert width."""
    norm_topk_prob: bool = True
    """Divide the chosen gate weights by their sum."""
    routed_scaling_factor: float = 1.0
    """Multiplies the gate weights; see model/router.py:gate_scale for the value that keeps the output's size."""
    n_group: int = 1
    """Expert groups for the group-limited choice of DeepSeek-V3."""
    topk_group: int = 1
    """Groups kept per token."""
    rms_norm_eps: float = 1e-6
    """Of the block and final norms; the two latent norms always use 1e-6, as in every released model."""
    rope_theta: float = 50000.0
    """Base of the rotary frequencies."""
    yarn_factor: float = 1.0
    """Context extension factor of YaRN; 1 switches YaRN off."""
    yarn_original_positions: int = 4096
    """Context length the model had before YaRN."""
    yarn_beta_fast: float = 32.0
    """Rotations above which a frequency is left alone."""
    yarn_beta_slow: float = 1.0
    """Rotations below which a frequency is divided by the factor."""
    yarn_mscale: float = 1.0
    """Numerator of the cos/sin multiplier."""
    yarn_mscale_all_dim: float = 1.0
    """Denominator of the cos/sin multiplier; also sets the softmax scale."""
    max_position_embeddings: int = 4096
    """Longest context the exported config promises."""
    initializer_range: float = 0.02
    """Standard deviation of the initial weights."""
    bos_token_id: int = 256
    """Written to the exported config."""
    eos_token_id: int = 258
    """Written to the exported config; generation stops there."""
    stop_token_ids: tuple[int, ...] = ()
    """Further ids at which generation stops; exported as a list behind eos_token_id."""
    pad_token_id: int = 257
    """Written to the exported config."""
    dtype: Dtype = "bfloat16"
    """What unquantised weights are served as. The training forward sees them rounded to it, so nothing changes at export."""

    def __post_init__(self):
        positive = (
            "vocab_size hidden_size num_hidden_layers num_attention_heads kv_lora_rank qk_nope_head_dim "
            "qk_rope_head_dim v_head_dim intermediate_size moe_intermediate_size n_routed_experts "
            "num_experts_per_tok n_shared_experts n_group topk_group max_position_embeddings "
            "yarn_original_positions"
        )
        for name in positive.split():
            require(getattr(self, name) >= 1, f"model.{name} must be at least 1, not {getattr(self, name)}")
        for name in ["routed_scaling_factor", "rms_norm_eps", "yarn_beta_fast", "yarn_beta_slow", "initializer_range"]:
            require(getattr(self, name) > 0, f"model.{name} must be positive, not {getattr(self, name)}")
        _in_float32("model", self)
        require(
            self.q_lora_rank is None or self.q_lora_rank >= 1,
            f"model.q_lora_rank must be at least 1, or None for no latent, not {self.q_lora_rank}",
        )
        require(self.rope_theta > 1, f"model.rope_theta must be greater than 1, not {self.rope_theta}")
        require(
            0 <= self.first_k_dense_replace < self.num_hidden_layers,
            f"model.first_k_dense_replace={self.first_k_dense_replace} leaves no MoE layer of {self.num_hidden_layers}; lower it",
        )
        require(self.qk_rope_head_dim % 2 == 0, "model.qk_rope_head_dim must be even: positions rotate pairs")
        require(
            self.num_experts_per_tok <= self.n_routed_experts,
            f"model.num_experts_per_tok={self.num_experts_per_tok} exceeds model.n_routed_experts={self.n_routed_experts}",
        )
        require(
            self.n_routed_experts % self.n_group == 0 and self.topk_group <= self.n_group,
            f"model.n_routed_experts={self.n_routed_experts} must be a multiple of model.n_group={self.n_group}, "
            f"and model.topk_group={self.topk_group} at most that",
        )
        reachable = self.n_routed_experts // self.n_group * self.topk_group
        require(
            self.num_experts_per_tok <= reachable,
            f"model.num_experts_per_tok={self.num_experts_per_tok} exceeds the {reachable} experts "
            f"that model.topk_group={self.topk_group} groups hold",
        )
        require(self.yarn_factor >= 1.0, f"model.yarn_factor must be at least 1, not {self.yarn_factor}")

    @property
    def num_moe_layers(self) -> int:
        return self.num_hidden_layers - self.first_k_dense_replace

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def shared_hidden(self) -> int:
        return self.n_shared_experts * self.moe_intermediate_size


@dataclass(frozen=True)
class OptimConfig:
    """Muon for matrices, AdamW for the rest, QK-Clip after both."""

    matrices: Literal["muon", "adamw"] = "muon"
    """Which rule updates the weight matrices; adamw exists for comparisons."""
    lr: float = 2e-4
    """Peak learning rate, shared by both rules (match_rms scaling makes it AdamW's)."""
    schedule: Literal["wsd", "cosine", "moonlight", "constant"] = "wsd"
    """wsd: warm-up, constant, decay (Kimi K2). cosine: warm-up, cosine. moonlight: its three stages."""
    warmup_steps: int = 20
    """Steps of linear warm-up from zero."""
    decay_fraction: float = 0.3
    """wsd: share of the steps that decay. moonlight: share of the third stage."""
    final_lr_ratio: float = 0.1
    """Last learning rate over the peak one."""
    weight_decay: float = 0.1
    """Decoupled; multiplied by the plain learning rate."""
    momentum: float = 0.95
    """Muon's."""
    nesterov: bool = True
    """Muon looks ahead along the momentum."""
    newton_schulz: Literal["keller", "quintic", "polar_express", "deepseek_v4"] = "keller"
    """Coefficient set; see optim/newton_schulz.py for the singular-value band of each."""
    newton_schulz_steps: int = 5
    """Iterations; must be a count that the set defines."""
    matrix_scale: Literal["match_rms", "keller", "unit_rms"] = "match_rms"
    """Shape factor on the orthogonal update; match_rms is 0.2*sqrt(max(rows, columns)), Moonlight's and K2's."""
    split_kv_a: bool = True
    """Orthogonalise the key/value latent and the shared rope key of kv_a apart."""
    momentum_dtype: Dtype = "float32"
    """Storage of Muon's momentum; the arithmetic is float32."""
    master_dtype: Dtype = "float32"
    """Storage of the weights; bfloat16 uses stochastic rounding."""
    adam_b1: float = 0.9
    """AdamW group."""
    adam_b2: float = 0.95
    """AdamW group."""
    adam_eps: float = 1e-8
    """AdamW group."""
    adam_lr_ratio: float = 1.0
    """Learning rate of the AdamW group over Muon's."""
    clip_norm: float = 1.0
    """Gradient-norm limit; 0 switches clipping off."""
    clip: Literal["adamw", "all"] = "adamw"
    """Which group is clipped; Muon's direction does not depend on the size of a gradient."""
    qk_clip_tau: float | None = 100.0
    """Largest attention logit a head may keep; None switches QK-Clip off."""
    router_bias_rate: float = 1e-3
    """Step of the router bias against the load error (gamma)."""
    router_bias_rule: Literal["sign", "centred"] = "sign"
    """sign: DeepSeek-V3's. centred: Moonlight's, which subtracts the mean sign."""

    def __post_init__(self):
        _in_float32("optim", self)
        require(self.lr > 0, f"optim.lr must be above 0, not {self.lr}")
        require(
            self.qk_clip_tau is None or self.qk_clip_tau > 0,
            f"optim.qk_clip_tau must be above 0, not {self.qk_clip_tau}; use None to switch QK-Clip off",
        )
        require(0 <= self.momentum < 1, f"optim.momentum must lie in [0, 1), not {self.momentum}")
        require(0 <= self.decay_fraction <= 1, f"optim.decay_fraction must lie in [0, 1], not {self.decay_fraction}")
        for name in ("adam_b1", "adam_b2"):
            require(0 <= getattr(self, name) < 1, f"optim.{name} must lie in [0, 1), not {getattr(self, name)}")
        require(self.adam_eps > 0, f"optim.adam_eps must be above 0, not {self.adam_eps}")
        require(self.warmup_steps <= MOST_STEPS, f"optim.warmup_steps must be at most {MOST_STEPS}, not {self.warmup_steps}")
        _not_negative("optim", self, "warmup_steps final_lr_ratio weight_decay adam_lr_ratio clip_norm router_bias_rate")


@dataclass(frozen=True)
class QuantConfig:
    """The grid that routed experts live on."""

    grid: Literal["none", "int4", "int3"] = "int4"
    """int4: 15 levels, one bf16 scale per group, Kimi's grid. none: bf16 training. int3: 7 levels, for measurements; no
    engine reads them, so they are not exported."""
    group_size: int = 32
    """Consecutive inputs that share a scale."""
    start_step: int = 0
    """First optimizer step whose forward pass sees grid weights."""
    ramp_steps: int = 0
    """Blend linearly from the plain weights to the grid over this many steps; 0 switches at once."""
    distill_weight: float = 0.0
    """Share of the loss that is KL to the bf16 weights of train.fork_from or train.init_from, frozen; the rest is
    cross-entropy."""

    def __post_init__(self):
        require(
            self.group_size >= 2 and self.group_size % 2 == 0,
            f"quant.group_size must be even, two codes to a byte, not {self.group_size}; 32 is what engines read",
        )
        _in_float32("quant", self)
        require(0 <= self.distill_weight <= 1, f"quant.distill_weight is a share of the loss, 0 to 1, not {self.distill_weight}")
        require(self.start_step >= 0 and self.ramp_steps >= 0, "quant.start_step and quant.ramp_steps cannot be negative")
        require(
            self.start_step + self.ramp_steps <= MOST_STEPS,
            f"quant.start_step and quant.ramp_steps must be at most {MOST_STEPS} together, not "
            f"{self.start_step + self.ramp_steps}",
        )

    @property
    def rounding_grid(self) -> str:
        """What masters are rounded to when their grid values are asked for: the run's own, or INT4 where it has none."""
        return "int4" if self.grid == "none" else self.grid


@dataclass(frozen=True)
class DataConfig:
    """What is trained on: files, or a built-in task when no path is given."""

    paths: tuple[str, ...] = ()
    """Files or folders: plain text, source code, JSONL (text, chat or token ids), .npy or ArrayRecord of token ids."""
    text_field: str = "text"
    """JSONL field that holds the text."""
    mixture: tuple[float, ...] = ()
    """Weight of each path, in rows, however full; empty takes everything once an epoch."""
    mode: Literal["interleaved", "preserved", "last_segment"] = "interleaved"
    """Training rows of a conversation: one per answer with earlier thoughts blanked, as served; one with all thoughts
    kept; or the row of the last answer only."""
    system: str | None = None
    """System message given to conversations that bring none; also in the exported chat template."""
    bad_rows: Literal["error", "drop"] = "error"
    """What a row that cannot be used does; dropped rows are counted and named."""
    too_long: Literal["error", "drop", "shorten"] = "error"
    """What a conversation longer than train.seq_len does; shorten leaves out its oldest whole tool exchanges."""
    task: str = "chain"
    """Built-in task used when data.paths is empty; see data/tasks.py."""
    task_length: tuple[int, int] = (2, 8)
    """Shortest and longest chain of a training problem, in steps."""
    tokenizer: str = "bytes"
    """bytes, or the path of a Hugging Face tokenizer.json or of a tiktoken file."""
    validation_fraction: float = 0.1
    """Last part of every text, held out."""
    seed: int = 0
    """Shuffles the rows, and draws the built-in task's problems."""

    def __post_init__(self):
        require(0 <= self.validation_fraction < 1, "data.validation_fraction must lie in [0, 1)")
        require(
            not self.mixture
            or len(self.mixture) == len(self.paths)
            and all(weight > 0 for weight in self.mixture)
            and math.isfinite(sum(self.mixture)),
            f"data.mixture needs one finite weight above 0 for each of the {len(self.paths)} data.paths, not {self.mixture}",
        )
        lo, hi = self.task_length
        require(1 <= lo <= hi, f"data.task_length must be two counts, the first at most the second, not {lo} {hi}")


@dataclass(frozen=True)
class TrainConfig:
    """The loop."""

    steps: int = 400
    """Optimizer steps of the whole run."""
    batch_size: int = 32
    """Rows per optimizer step, over all devices."""
    seq_len: int = 256
    """Tokens per row."""
    accumulate: int = 1
    """Microbatches per step."""
    seed: int = 0
    """Of the initial weights."""
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of activations and matmul inputs; auto takes what this machine multiplies fastest."""
    remat: Literal["none", "layer", "names", "hidden", "offload"] = "none"
    """What the backward pass recomputes: nothing, whole layers, or all but the named tensors of model/remat.py; hidden keeps
    what experts give before SwiGLU too, offload the named ones in the host's memory."""
    layers: Literal["scan", "unroll"] = "scan"
    """The MoE layers as one loop, or written out: longer to compile, free for the compiler to overlap."""
    transport: Literal["auto", "all_gather", "all_to_all", "ragged_all_to_all"] = "auto"
    """How tokens reach experts on other devices of mesh.expert (model/transport/); auto goes by the machine."""
    z_loss: float = 0.0
    """Weight of the squared log-sum-exp of the logits."""
    balance_loss: float = 0.0
    """Weight of DeepSeek-V3's sequence-wise balance loss."""
    log_every: int = 10
    """Steps between printed lines; metrics.jsonl has every step."""
    eval_every: int = 0
    """Steps between evaluations on held-out rows; 0 evaluates at the end only."""
    eval_batches: int = 8
    """Batches of one evaluation; 0 takes all held-out rows."""
    checkpoint_every: int = 200
    """Steps between checkpoints; the last step is always saved."""
    keep: int = 2
    """Newest checkpoints kept; the one at quant.start_step stays besides."""
    init_from: str | None = None
    """Run directory, or RUN@STEP, whose weights this run starts from, with a new optimizer at step 0."""
    fork_from: str | None = None
    """RUN@STEP whose whole state this run goes on from; RUN@grid is the last step before its experts met the grid."""

    def __post_init__(self):
        for name in ("steps", "batch_size", "seq_len", "accumulate", "log_every", "checkpoint_every"):
            require(getattr(self, name) >= 1, f"train.{name} must be at least 1, not {getattr(self, name)}")
        require(self.steps <= MOST_STEPS, f"train.steps must be at most {MOST_STEPS}, not {self.steps}")
        require(-(2**63) <= self.seed < 2**63, f"train.seed has 64 bits, with its sign; {self.seed} needs more")
        _in_float32("train", self)
        require(self.keep >= 2, "train.keep must be at least 2: a damaged newest checkpoint needs one to fall back to")
        _not_negative("train", self, "z_loss balance_loss eval_every eval_batches")
        require(not (self.init_from and self.fork_from), "train.init_from and train.fork_from exclude each other")
        require(
            self.batch_size % self.accumulate == 0,
            f"train.batch_size={self.batch_size} must be a multiple of train.accumulate={self.accumulate}",
        )


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; the product must be the number of devices."""

    data: int = 0
    """Copies of the model, each with its own rows; 0 takes the devices that the other axes leave."""
    fsdp: int = 1
    """Rows and weights are split."""
    expert: int = 1
    """Experts, and rows, are split."""
    context: int = 1
    """Positions of a row are split."""
    tensor: int = 1
    """Heads and hidden widths are split."""

    def __post_init__(self):
        for axis in dataclasses.fields(self):
            least = 0 if axis.name == "data" else 1
            require(getattr(self, axis.name) >= least, f"mesh.{axis.name} must be at least {least}")


@dataclass(frozen=True)
class ProfileConfig:
    """Where the time of a step goes."""

    steps: str = ""
    """FIRST:LAST, steps whose trace is written to RUN/profile for xprof; nothing else about the run changes."""

    def __post_init__(self):
        bounds = self.steps.split(":")
        require(
            not self.steps or len(bounds) == 2 and all(b.isdigit() for b in bounds) and 1 <= int(bounds[0]) <= int(bounds[1]),
            f"profile.steps should be FIRST:LAST, two step numbers from 1 on, not {self.steps!r}",
        )

    def bounds(self) -> tuple[int, int] | None:
        """First and last traced step."""
        return tuple(map(int, self.steps.split(":"))) if self.steps else None


@dataclass(frozen=True)
class RunConfig:
    """One training run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    quant: QuantConfig = field(default_factory=QuantConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)

    def checked(self) -> RunConfig:
        """Itself, if its sections fit each other; ConfigError if not. Asked when a run begins: before that a preset takes another
        run's model, to which flags then fit the rest, and a run that is there must stay readable."""
        require(
            self.train.seq_len <= self.model.max_position_embeddings,
            f"train.seq_len={self.train.seq_len} is more than model.max_position_embeddings="
            f"{self.model.max_position_embeddings}, which the exported config promises; raise that too, and "
            "model.yarn_factor to extend a trained context",
        )
        require(
            self.data.system is None or not any("\ud800" <= character <= "\udfff" for character in self.data.system),
            "data.system holds half a character, which no file can: what a shell hands over has to be UTF-8",
        )
        if self.quant.grid != "none":
            for name in ("hidden_size", "moe_intermediate_size"):
                width = getattr(self.model, name)
                require(
                    width % self.quant.group_size == 0,
                    f"model.{name}={width} is not divisible by quant.group_size={self.quant.group_size}; "
                    f"the nearest width that is: {max(round(width / self.quant.group_size), 1) * self.quant.group_size}",
                )
        return self
