"""Abruzzi's command line: `python launch.py VERB --help`. Parses, sets up JAX, and calls one function."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass, make_dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, get_type_hints

import tyro

from configs.plans import MACHINES
from configs.presets import preset
from configs.schema import ConfigError, RunConfig, require

RUN = Path("runs/tiny")


@dataclass(frozen=True)
class Train:
    """Train a preset, or go on with a run directory."""

    preset: str = "tiny"
    """What all settings are before the other flags change them."""
    run: str | None = None
    """Run directory, new or one to go on with; default runs/PRESET."""
    on: str = "local"
    """local:2x4: two processes of four simulated devices. cluster: this host is one of several."""
    remix: tyro.conf.FlagCreatePairsOff[bool] = False
    """Lets a run that is resumed change data.mixture."""

    def __call__(self, cfg: RunConfig, given: list[str]) -> int:
        return _on(self.on, ["train", *given], cfg, lambda: self.here(cfg))

    def here(self, cfg: RunConfig) -> int:
        from train.loop import train
        from train.run_dir import RunDir

        return train(cfg, RunDir(self.directory()), self.remix)

    def directory(self) -> str:
        return self.run or f"runs/{self.preset}"


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
    task: str = ""
    """Built-in task that asks when there is no prompt: chain, if you name none."""
    length: int = 0
    """Steps of that task's problem; 0 for 5."""
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
        return generate(
            self.weights,
            self.prompt,
            raw=self.raw,
            task=self.task,
            length=self.length,
            tools=self.tools,
            limits=limits,
            sampling=Sampling(self.temperature, self.top_p, self.min_p, self.seed),
        )


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
    pre_tokenizer: str | None = None
    """gguf: llama.cpp's name of the rule that splits text before merging, such as kimi-k2; the byte tokenizer needs none."""

    def __call__(self) -> int:
        from train.export import export_gguf, export_run

        require(self.pre_tokenizer is None or self.format == "gguf", "--pre-tokenizer is a word of --format gguf; leave it out")
        if self.format == "gguf":
            return export_gguf(self.run, self.out, self.pre_tokenizer)
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


@dataclass(frozen=True)
class Import:
    """Read a Hugging Face directory, or its files (bf16, f32 or INT4), into a new run.

    Model and quant come from the files, everything else from the preset."""

    sources: tyro.conf.Positional[tuple[Path, ...]] = ()
    """A directory, or files with config.json among them."""
    preset: str = "tiny"
    """What all other settings are before flags change them."""
    run: str | None = None
    """New run directory; default runs/NAME of the directory."""
    on: str = "local"
    """As in train."""

    def __call__(self, cfg: RunConfig, given: list[str]) -> int:
        if not self.sources:
            raise ConfigError("name what to import: launch.py import DIR --run RUN, or files with config.json among them")
        return _on(self.on, ["import", *given], cfg, lambda: self.here(cfg))

    def here(self, cfg: RunConfig) -> int:
        from train.import_hf import import_checkpoint
        from train.run_dir import RunDir

        first = self.sources[0].resolve()
        run = self.run or f"runs/{first.name if len(self.sources) < 2 else first.parent.name}"
        return import_checkpoint(list(self.sources), cfg, self.preset, RunDir(run))


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


@dataclass(frozen=True)
class LookAtData:
    """What the data is that a training run with these settings would see, and rows with the trained tokens in colour."""

    preset: str = "tiny"
    """What all settings are before the other flags change them."""
    rows: int = 2
    """Rows of the first batch to show."""
    index: str | None = None
    """FILE.array_record: tokenise the data once into this file, which data.paths can then name instead."""

    def __call__(self, cfg: RunConfig, _given: list[str]) -> int:
        cfg.checked()
        require(self.rows > 0, f"--rows must be at least 1, not {self.rows}")
        from data.pipeline import open_data, write_index
        from data.preview import show
        from data.tokenizer import load_tokenizer
        from train.console import console

        if self.index is not None:
            require(
                self.index.endswith(".array_record"),
                f"--index {self.index}: give it the ending .array_record, by which it will be known",
            )
            documents = write_index(cfg, load_tokenizer(cfg.data.tokenizer), self.index)
            console.print(f"wrote {documents} documents to {self.index}")
        show(open_data(cfg, load_tokenizer(cfg.data.tokenizer)), console, rows=self.rows)
        return 0


@dataclass(frozen=True)
class Plan:
    """Parameters, update rules, bytes and FLOPs of a preset; with a topology, its step compiled for chips that are not there.

    What the compiler tells is printed: memory, collectives, roofline, predicted speed."""

    preset: str = "tiny"
    """What all settings are before the other flags change them."""
    topology: str | None = None
    """The machine, such as v5p:8x8x8 (docs/plan.md); default: that of the preset, if it has one."""
    sweep: int = 0
    """Compile up to so many meshes that fit the machine, and rank them."""
    json: Path | None = None
    """File for everything that was found."""

    def __call__(self, cfg: RunConfig, _given: list[str]) -> int:
        cfg.checked()
        require(self.sweep >= 0, f"--sweep must be at least 0, not {self.sweep}")
        if machine := MACHINES.get(self.preset, "") if self.topology is None else self.topology:
            from train.plan.on_topology import show_topology, sweep

            if self.sweep:
                return sweep(self.preset, cfg, machine, self.sweep, self.json)
            return show_topology(self.preset, cfg, machine, self.json)
        if self.sweep or self.json:
            raise ConfigError(
                f"{'--sweep' if self.sweep else '--json'} needs a machine; name it with --topology, such as v5p:8x8x8"
            )
        from train.plan.summary import show_plan

        return show_plan(self.preset, cfg)


WITH_CONFIG = {"train": Train, "plan": Plan, "data": LookAtData, "import": Import}
"""Verbs that take every field of the run config beside their own flags."""

VERBS = WITH_CONFIG | {
    "eval": Eval,
    "generate": Generate,
    "export": Export,
    "verify": Verify,
    "distort": Distort,
    "report": Report,
}


def _with_config(verb: str, arguments: list[str]) -> Callable[[], int]:
    """The verb and its run config, parsed together: the preset with the fields that flags set, of a run that is there with what
    it was begun from, of one that starts from another's weights with its network and tokenizer."""
    kind, dashed = VERBS[verb], _dashed(arguments)
    known, _ = tyro.cli(kind, args=dashed, return_unknown_args=True, add_help=False)
    both = make_dataclass(
        verb, [("own", Annotated[kind, tyro.conf.arg(name="")]), ("cfg", Annotated[RunConfig, tyro.conf.arg(name="")])]
    )

    def parse(base: RunConfig):
        return tyro.cli(
            both,
            args=dashed,
            default=both(kind(), base),
            prog=f"launch.py {verb}",
            description=f"{inspect.getdoc(kind)}\n\nEvery field of the preset can be set as --section.field value.",
        )

    base = preset(known.preset)
    if verb == "train":
        from train.run_dir import with_origin_of

        base = with_origin_of(base, known.directory())
    found = parse(base)
    for source in filter(None, (found.cfg.train.init_from, found.cfg.train.fork_from)):
        from train.run_dir import with_network_of

        base = with_network_of(base, known.directory() if verb == "train" else None, source)
        found = parse(base)
    return partial(found.own, found.cfg, arguments)


def _each_once(arguments: list[str]) -> None:
    """ConfigError for a flag that is given twice: the first one's values would be lost."""
    flags = [word.partition("=")[0].replace("_", "-") for word in arguments if word.startswith("--") and word != "--"]
    if twice := next((flag for flag in flags if flags.count(flag) > 1), None):
        raise ConfigError(f"{twice} is given twice; give it once, with all its values behind it")


def _dashed(arguments: list[str]) -> list[str]:
    """`section.field=value`, `--section.field=value` and `--section.field_name value` become `--section.field-name value`, and
    `section.field=false` becomes `--section.no-field`."""
    out = []
    for word in arguments:
        name, equals, value = word.partition("=")
        if (
            equals
            and "." in name
            and name.lstrip("-").replace(".", "").replace("_", "").replace("-", "").isalnum()
            and "/" not in name
            and name.lstrip("-").split(".")[0] in RunConfig.__dataclass_fields__
        ):
            section, _, field = name.lstrip("-").replace("_", "-").partition(".")
            kind = get_type_hints(get_type_hints(RunConfig)[section]).get(field.replace("-", "_"))
            switch = {"true": "", "false": "no-"}.get(value.lower()) if kind is bool else None
            out += [f"--{section}.{field}", value] if switch is None else [f"--{section}.{switch}{field}"]
        elif word.startswith("--") and "." in name and not equals:
            out.append(word.replace("_", "-"))
        else:
            out.append(word)
    _each_once(out)
    return out


def main(argv: list[str]) -> int:
    from train.stop import EXIT_INTERRUPTED, EXIT_USAGE

    verbs = sorted(VERBS)
    if not argv or argv[0] in ("-h", "--help"):
        print(f"{__doc__}\n\nverbs: {', '.join(verbs)}\n")
        for verb in verbs:
            print(f"  {verb:<10}{VERBS[verb].__doc__.splitlines()[0]}")
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
            return _with_config(verb, arguments)()
        _each_once(arguments)
        return tyro.cli(VERBS[verb], args=arguments, prog=f"launch.py {verb}")()
    except (ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USAGE
    except KeyboardInterrupt as stopped:
        print(str(stopped) or f"{verb} was stopped", file=sys.stderr)
        return EXIT_INTERRUPTED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
