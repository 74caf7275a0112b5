"""Abruzzi's command line: `python launch.py VERB --help`. Parses, sets up JAX, and calls one function."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from configs.presets import preset
from configs.schema import ConfigError, RunConfig

RUN = Path("runs/tiny")


def train(arguments: list[str]) -> int:
    """Train a preset, or go on with a run directory."""
    name, arguments = _take(arguments, "--preset", "tiny")
    run, arguments = _take(arguments, "--run", f"runs/{name}")
    cfg = tyro.cli(RunConfig, default=preset(name), args=arguments, prog=f"launch.py train --preset {name} --run {run}",
                   description="Train; every field of the preset can be set as --section.field value.")
    from train.loop import train
    from train.run_dir import RunDir
    return train(cfg, RunDir(run))


@dataclass(frozen=True)
class Eval:
    """Held-out loss, and for built-in tasks exact answers by chain length, of one or more sets of weights."""

    arms: tyro.conf.Positional[tuple[str, ...]] = ()
    """NAME=RUN[@STEP][:bf16|int4] or NAME=EXPORT_DIR; without any: the run's weights without and with the grid."""
    run: Path = RUN
    """Run directory whose data and task are used, and whose evals.jsonl is written."""
    lengths: tuple[int, ...] = ()
    """Chain lengths; default: from the shortest to twice the longest trained one."""
    problems: int = 128
    """Problems per length."""

    def __call__(self) -> int:
        from eval.run import evaluate_arms
        return evaluate_arms(self.run, self.arms, self.lengths, self.problems)


@dataclass(frozen=True)
class Generate:
    """Answer a prompt, token by token."""

    prompt: tyro.conf.Positional[str] = ""
    """A user message; without one, a held-out problem of the task."""
    weights: str = str(RUN)
    """RUN[@STEP][:bf16|int4] or an exported directory."""
    task: str = "chain"
    """Built-in task that asks when there is no prompt."""
    raw: bool = False
    """Continue the text as it stands, without chat frame (for models trained on plain text)."""
    max_new_tokens: int = 256
    """Where to stop at the latest."""
    temperature: float = 0.0
    """0 takes the most likely token."""
    top_p: float = 1.0
    """Sample from the smallest set of tokens with this probability."""
    min_p: float = 0.0
    """Leave out tokens less likely than this share of the best one."""
    seed: int = 0
    """Of the sampling."""

    def __call__(self) -> int:
        from eval.chat import generate
        return generate(self.weights, self.prompt, raw=self.raw, max_new_tokens=self.max_new_tokens,
                        temperature=self.temperature, top_p=self.top_p, min_p=self.min_p, seed=self.seed, task=self.task)


@dataclass(frozen=True)
class Export:
    """Write a run's weights as a Hugging Face directory."""

    run: tyro.conf.Positional[str] = str(RUN)
    """RUN or RUN@STEP."""
    out: Path | None = None
    """New directory; default RUN/export (RUN/model.gguf for gguf)."""
    format: Literal["int4", "bf16", "gguf"] = "int4"
    """int4: compressed-tensors pack-quantized experts. bf16: all weights as they are in the masters. gguf: the int4
    export's codes, unchanged, for llama.cpp."""

    def __call__(self) -> int:
        from train.export import export_run
        return export_run(self.run, self.out, self.format)


@dataclass(frozen=True)
class Verify:
    """Check an exported directory; with --run, that every weight is the one the training forward used."""

    directory: tyro.conf.Positional[Path]
    """Any compressed-tensors INT4 MoE directory."""
    run: str | None = None
    """RUN or RUN@STEP that it was exported from."""

    def __call__(self) -> int:
        from train.export import verify_directory
        return verify_directory(self.directory, self.run)


@dataclass(frozen=True)
class Distort:
    """What INT4 costs: every post-training baseline of a run's weights, and other weights, against bf16."""

    source: tyro.conf.Positional[str] = str(RUN)
    """RUN or RUN@STEP whose masters are the reference."""
    arms: tyro.conf.Positional[tuple[str, ...]] = ()
    """Further arms, NAME=WEIGHTS as in eval."""
    calibration_batches: int = 8
    """Training batches that the calibrated baselines see."""

    def __call__(self) -> int:
        from eval.distortion import distortion_report
        return distortion_report(self.source, self.arms, self.calibration_batches)


@dataclass(frozen=True)
class Report:
    """Draw report.md and its plots from metrics.jsonl and evals.jsonl."""

    run: tyro.conf.Positional[Path] = RUN
    """Run directory."""

    def __call__(self) -> int:
        from eval.report import write_report
        return write_report(self.run)


def import_(arguments: list[str]) -> int:
    """Read a Hugging Face directory (bf16, f32 or INT4) into a new run."""
    directory, arguments = (arguments[0], arguments[1:]) if arguments and arguments[0][0] != "-" else ("", arguments)
    if not directory and "--help" not in arguments:
        raise ConfigError("name the directory to import: launch.py import DIR --run RUN")
    name, arguments = _take(arguments, "--preset", "tiny")
    run, arguments = _take(arguments, "--run", f"runs/{Path(directory).name}")
    cfg = tyro.cli(RunConfig, default=preset(name), args=arguments, prog=f"launch.py import DIR --preset {name} --run {run}",
                   description="Import; model and quant come from the files, the rest from the preset.")
    from train.import_hf import import_directory
    from train.run_dir import RunDir
    return import_directory(Path(directory), cfg, RunDir(run))


def data(arguments: list[str]) -> int:
    """What the data is, and rows with the trained tokens in colour."""
    name, arguments = _take(arguments, "--preset", "tiny")
    rows, arguments = _take(arguments, "--rows", "2")
    cfg = tyro.cli(RunConfig, default=preset(name), args=arguments, prog=f"launch.py data --preset {name} --rows {rows}",
                   description="Look at the data that a training run with these settings would see.")
    from data.pipeline import open_data
    from data.preview import show
    from data.tokenizer import load_tokenizer
    from train.console import console
    show(open_data(cfg, load_tokenizer(cfg.data.tokenizer)), console, rows=int(rows))
    return 0


def plan(arguments: list[str]) -> int:
    """Parameter table, optimizer routing, counts, bytes and FLOPs of a preset, without training."""
    name, arguments = _take(arguments, "--preset", "tiny")
    cfg = tyro.cli(RunConfig, default=preset(name), args=arguments, prog=f"launch.py plan --preset {name}",
                   description="Show what would be trained.")
    from train.plan import show_plan
    return show_plan(name, cfg)


WITH_CONFIG = {"train": train, "plan": plan, "data": data, "import": import_}
VERBS = {"eval": Eval, "generate": Generate, "export": Export, "verify": Verify, "distort": Distort, "report": Report}


def _take(arguments: list[str], flag: str, default: str) -> tuple[str, list[str]]:
    """The value of a flag that must be known before the others are parsed, and the rest."""
    rest, value = [], default
    words = iter(arguments)
    for word in words:
        if word == flag:
            value = next(words, None)
            if value is None:
                raise ConfigError(f"{flag} needs a value")
        elif word.startswith(flag + "="):
            value = word[len(flag) + 1:]
        else:
            rest.append(word)
    return value, rest


def _dashed(arguments: list[str]) -> list[str]:
    """`section.field=value` and `--section.field=value` become `--section.field value`."""
    out = []
    for word in arguments:
        name, equals, value = word.partition("=")
        if equals and "." in name and name.lstrip("-").replace(".", "").replace("_", "").replace("-", "").isalnum() \
                and "/" not in name and name.lstrip("-").split(".")[0] in RunConfig.__dataclass_fields__:
            out += ["--" + name.lstrip("-"), value]
        else:
            out.append(word)
    return out


def main(argv: list[str]) -> int:
    from train.stop import EXIT_USAGE

    verbs = sorted([*WITH_CONFIG, *VERBS])
    if not argv or argv[0] in ("-h", "--help"):
        print(f"{__doc__}\n\nverbs: {', '.join(verbs)}\n")
        for verb in verbs:
            print(f"  {verb:<10}{((WITH_CONFIG | VERBS)[verb].__doc__ or '').strip()}")
        return 0 if argv else EXIT_USAGE
    verb, arguments = argv[0], argv[1:]
    try:
        if verb not in verbs:
            import difflib
            nearest = difflib.get_close_matches(verb, verbs, 1)
            hint = f"did you mean {nearest[0]}?" if nearest else f"there are: {', '.join(verbs)}"
            raise ConfigError(f"there is no verb {verb!r}; {hint}")
        from train.compat import start_jax
        start_jax()
        if verb in WITH_CONFIG:
            return WITH_CONFIG[verb](_dashed(arguments))
        return tyro.cli(VERBS[verb], args=arguments, prog=f"launch.py {verb}")()
    except (ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USAGE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
