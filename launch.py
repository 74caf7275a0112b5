"""Abruzzi's command line: `python launch.py VERB --help`. Parses, sets up JAX, and calls one function."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from configs.plans import MACHINES
from configs.presets import preset
from configs.schema import ConfigError, RunConfig

RUN = Path("runs/tiny")


def train(arguments: list[str], given: list[str]) -> int:
    """Train a preset, or go on with a run directory."""
    name, arguments = _take(arguments, "--preset", "tiny")
    run, arguments = _take(arguments, "--run", f"runs/{name}")
    where, arguments = _take(arguments, "--on", "local")
    remix, arguments = "--remix" in arguments, [word for word in arguments if word != "--remix"]
    cfg = _config(name, arguments, f"train --preset {name} --run {run} --on local",
                  "Train; every field of the preset can be set as --section.field value. "
                  "--on local:2x4: two processes of four simulated devices; --on cluster: this host is one of several. "
                  "--remix: a run that is resumed may change data.mixture.", run)
    return _on(where, ["train", *given], cfg, lambda: _train(cfg, run, remix))


def _train(cfg: RunConfig, run: str, remix: bool) -> int:
    from train.loop import train
    from train.run_dir import RunDir
    return train(cfg, RunDir(run), remix)


@dataclass(frozen=True)
class Eval:
    """Held-out loss, and for built-in tasks exact answers by chain length, of one or more sets of weights."""

    arms: tyro.conf.Positional[tuple[str, ...]] = ()
    """NAME=RUN[@STEP][:bf16|int4|BASELINE] or NAME=DIR[:bf16|int4]; without any: the run's weights without and with the grid.
    BASELINE: rtn, rtn75, mse, mse_signed, hqq, gptq, awq, lsq; with three bits rtn3, mse3, gptq3, awq3, lsq3."""
    run: Path = RUN
    """Run directory whose data and task are used, and whose evals.jsonl is written."""
    lengths: tuple[int, ...] = ()
    """Chain lengths; default: from the shortest to twice the longest trained one."""
    problems: int = 128
    """Problems per length; suite horizon plays fewer of the chains above 30 steps, 8 at least."""
    suite: Literal["loss", "horizon"] = "loss"
    """loss: held-out loss and answers around the trained lengths. horizon: chains of 1 to 300 steps in a live loop,
    with tokens, loops, valid calls and the distance to the first arm, all with intervals."""
    minutes: float = 10.0
    """Time for suite horizon; lengths that do not fit are left out, and named."""

    def __call__(self) -> int:
        from eval.run import evaluate_arms
        return evaluate_arms(self.run, self.arms, self.lengths, self.problems, self.suite, self.minutes)


@dataclass(frozen=True)
class Generate:
    """Answer a prompt, token by token, with tools if there are any."""

    prompt: tyro.conf.Positional[str] = ""
    """A user message; without one, a held-out problem of the task, with the task's own tools."""
    weights: str = str(RUN)
    """RUN[@STEP][:bf16|int4|BASELINE] or an exported DIR[:bf16|int4]."""
    tools: tuple[str, ...] = ()
    """calculator, key_value, MODULE:FUNCTION, or FILE.py for all its public functions."""
    task: str = "chain"
    """Built-in task that asks when there is no prompt."""
    length: int = 5
    """Steps of that task's problem."""
    raw: bool = False
    """Continue the text as it stands, without chat frame (for models trained on plain text)."""
    max_new_tokens: int = 256
    """Where a reply stops at the latest."""
    max_replies: int = 1000
    """Replies, each of which may call tools, of the whole conversation."""
    think_budget: int | None = None
    """Tokens of thought in the whole conversation; the model's thoughts are closed when it is spent."""
    context: int | None = None
    """Tokens of a prompt with its reply; where there are more, the oldest tool exchanges are left out."""
    temperature: float = 0.0
    """0 takes the most likely token."""
    top_p: float = 1.0
    """Sample from the smallest set of tokens with this probability."""
    min_p: float = 0.0
    """Leave out tokens less likely than this share of the best one."""
    seed: int = 0
    """Of the sampling."""

    def __call__(self) -> int:
        from eval.chat import Limits, generate
        from model.decode.sampling import Sampling
        limits = Limits(self.max_new_tokens, self.max_replies, self.think_budget, self.context)
        return generate(self.weights, self.prompt, raw=self.raw, task=self.task, length=self.length, tools=self.tools,
                        limits=limits, sampling=Sampling(self.temperature, self.top_p, self.min_p, self.seed))


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


def import_(arguments: list[str], given: list[str]) -> int:
    """Read a Hugging Face directory, or its files (bf16, f32 or INT4), into a new run."""
    count = next((i for i, word in enumerate(arguments) if word.startswith("-")), len(arguments))
    sources, arguments = [Path(word) for word in arguments[:count]], arguments[count:]
    if not sources and "--help" not in arguments:
        raise ConfigError("name what to import: launch.py import DIR --run RUN, or files with config.json among them")
    name, arguments = _take(arguments, "--preset", "tiny")
    first = sources[0].resolve() if sources else Path("DIR")
    run, arguments = _take(arguments, "--run", f"runs/{first.name if len(sources) < 2 else first.parent.name}")
    where, arguments = _take(arguments, "--on", "local")
    cfg = _config(name, arguments, f"import DIR_OR_FILES --preset {name} --run {run} --on local",
                  "Import; model and quant come from the files, the rest from the preset. --on as in train.")
    return _on(where, ["import", *given], cfg, lambda: _import(sources, cfg, name, run))


def _import(sources: list[Path], cfg: RunConfig, name: str, run: str) -> int:
    from train.import_hf import import_checkpoint
    from train.run_dir import RunDir
    return import_checkpoint(sources, cfg, name, RunDir(run))


def _on(where: str, command: list[str], cfg: RunConfig, work: Callable[[], int]) -> int:
    """`work` here, as one of several processes if `where` says so; or `command` in processes of its own."""
    from train import local, processes
    if where not in ("local", "cluster") and not processes.joined_by_launcher():
        return local.run(command, *local.parse(where, cfg.mesh))
    processes.join(cluster=where == "cluster")
    from train.console import console
    console.quiet = not processes.first()
    with processes.ending_together():
        return work()


def data(arguments: list[str], _given: list[str]) -> int:
    """What the data is, and rows with the trained tokens in colour."""
    name, arguments = _take(arguments, "--preset", "tiny")
    rows, arguments = _take(arguments, "--rows", "2")
    index, arguments = _take(arguments, "--index", "")
    cfg = _config(name, arguments, f"data --preset {name} --rows {rows}",
                  "Look at the data that a training run with these settings would see. --index FILE.array_record: tokenise it "
                  "once into a file, which data.paths can then name instead.").checked()
    shown = _count("--rows", rows, 1)
    from data.pipeline import open_data, write_index
    from data.preview import show
    from data.tokenizer import load_tokenizer
    from train.console import console
    if index:
        if not index.endswith(".array_record"):
            raise ConfigError(f"--index {index}: give it the ending .array_record, by which it will be known")
        console.print(f"wrote {write_index(cfg, load_tokenizer(cfg.data.tokenizer), index)} documents to {index}")
    show(open_data(cfg, load_tokenizer(cfg.data.tokenizer)), console, rows=shown)
    return 0


def plan(arguments: list[str], _given: list[str]) -> int:
    """Parameter table, optimizer routing, counts, bytes and FLOPs of a preset; with --topology, its step compiled for
    chips that need not be there: memory, collectives, roofline, predicted speed."""
    name, arguments = _take(arguments, "--preset", "tiny")
    machine, arguments = _take(arguments, "--topology", MACHINES.get(name, ""))
    meshes, arguments = _take(arguments, "--sweep", "0")
    file, arguments = _take(arguments, "--json", "")
    cfg = _config(name, arguments, f"plan --preset {name} --topology {machine or 'v5p:8x8x8'} --sweep 8 --json FILE",
                  "Show what would be trained.").checked()
    limit = _count("--sweep", meshes, 0)
    if not machine:
        if limit or file:
            raise ConfigError(f"{'--sweep' if limit else '--json'} needs a machine; name it with --topology, such as v5p:8x8x8")
        from train.plan import show_plan
        return show_plan(name, cfg)
    from train.plan_topology import show_topology, sweep
    return sweep(name, cfg, machine, limit, file) if limit else show_topology(name, cfg, machine, file)


WITH_CONFIG = {"train": train, "plan": plan, "data": data, "import": import_}
VERBS = {"eval": Eval, "generate": Generate, "export": Export, "verify": Verify, "distort": Distort, "report": Report}


def _config(name: str, arguments: list[str], prog: str, description: str, run: str | None = None) -> RunConfig:
    """The preset of this name with the fields that the arguments set; of a run that starts from another's weights, with its
    network and tokenizer."""
    base = preset(name)
    for field in ("init_from", "fork_from"):
        source, _ = _take(arguments, f"--train.{field.replace('_', '-')}", getattr(base.train, field) or "None")
        if source != "None":
            from train.run_dir import with_network_of
            base = with_network_of(base, run, source)
    return tyro.cli(RunConfig, default=base, args=arguments, prog=f"launch.py {prog}", description=description)


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


def _count(flag: str, text: str, least: int) -> int:
    """A whole number, at least `least`."""
    if not text.isdecimal() or int(text) < least:
        raise ConfigError(f"{flag} must be a whole number, at least {least}, not {text!r}")
    return int(text)


def _each_once(arguments: list[str]) -> None:
    """ConfigError for a flag that is given twice: the first one's values would be lost."""
    flags = [word.partition("=")[0].replace("_", "-") for word in arguments if word.startswith("--") and word != "--"]
    if twice := next((flag for flag in flags if flags.count(flag) > 1), None):
        raise ConfigError(f"{twice} is given twice; give it once, with all its values behind it")


def _dashed(arguments: list[str]) -> list[str]:
    """`section.field=value`, `--section.field=value` and `--section.field_name value` become `--section.field-name value`."""
    out = []
    for word in arguments:
        name, equals, value = word.partition("=")
        if equals and "." in name and name.lstrip("-").replace(".", "").replace("_", "").replace("-", "").isalnum() \
                and "/" not in name and name.lstrip("-").split(".")[0] in RunConfig.__dataclass_fields__:
            out += ["--" + name.lstrip("-").replace("_", "-"), value]
        elif word.startswith("--") and "." in name and not equals:
            out.append(word.replace("_", "-"))
        else:
            out.append(word)
    _each_once(out)
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
        start_jax("cpu" if verb == "plan" else None)  # a plan is compiled for chips that are not here
        if verb in WITH_CONFIG:
            return WITH_CONFIG[verb](_dashed(arguments), arguments)
        _each_once(arguments)
        return tyro.cli(VERBS[verb], args=arguments, prog=f"launch.py {verb}")()
    except (ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USAGE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
