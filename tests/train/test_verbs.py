"""The command line as a user meets it: every verb on a small run, and what wrong commands say."""

import dataclasses
import json
import re
import shutil
from collections import Counter

import pytest
from jax.profiler import ProfileData

import launch
from configs.presets import preset
from configs.schema import ConfigError
from train.run_dir import RunDir, with_network_of
from train.session import parse_source
from train.stop import EXIT_DONE, EXIT_USAGE

WRONG = {
    "unknown verb": (["trian"], "did you mean train?"),
    "unknown preset": (["train", "--preset", "tiney"], "did you mean tiny?"),
    "missing data": (["train", "--data.paths", "no/such/file"], "no file or folder no/such/file"),
    "splitter of another format": (["export", "--pre-tokenizer", "kimi-k2"], "--pre-tokenizer is a word of --format gguf"),
    "no run": (["eval", "--run", "no/such/run"], "no/such/run is not a run directory"),
    "not weights": (["generate", "1a+1=", "--weights", "docs"], "neither a run directory"),
    "no kind of weights": (
        ["generate", "1a+1=", "--weights", "docs:int8"],
        "docs:int8: 'int8' is no kind of weights; write one of bf16, int4",
    ),
    "mesh": (["train", "--mesh.fsdp", "3"], "choose axes whose product is 8"),
    "odd width": (["train", "--model.hidden-size", "100"], "model.hidden_size=100 is not divisible by"),
    "odd width in a plan": (["plan", "--model.hidden-size", "100"], "model.hidden_size=100 is not divisible by"),
    "rows without end": (["data", "--train.seq-len", "8192"], "more than model.max_position_embeddings=4096"),
    "one expert": (["train", "--model.num-experts-per-tok", "1"], "leaves the router without a gradient"),
    "odd step": (["export", "runs/x@last"], "should be a run directory, RUN@STEP"),
    "odd digit": (["export", "runs/x@²"], "should be a run directory, RUN@STEP"),
    "no step": (["export", "runs/x@"], "runs/x@ ends without a step; write runs/x@STEP"),
    "no step before a kind": (["generate", "--weights", "runs/x@:bf16"], "runs/x@ ends without a step"),
    "a start without a step": (["train", "--train.init-from", "runs/x@"], "runs/x@ ends without a step"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_command_is_one_sentence_and_changes_nothing(case, capsys, tmp_path):
    arguments, sentence = WRONG[case]
    if arguments[0] == "train" and len(arguments) > 2:
        arguments = [*arguments, "--run", str(tmp_path / "run")]
    assert launch.main(arguments) == EXIT_USAGE
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and sentence in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--model.hiden-size", "64"], "--model.hidden-size"),
        (["--runn", "x"], "--run"),
        (["--preset"], "Missing value for argument '--preset'"),
        (["--train.steps", "many"], "many"),
        (["--profile.steps", "5:3"], "FIRST:LAST"),
        (["--model.initializer-range", "nan"], "model.initializer_range must be positive, not nan"),
        (["--model.yarn-factor", "inf"], "model.yarn_factor must be finite, not inf"),
        (["--optim.lr", "1e39"], "optim.lr is computed with in float32"),
        (["--optim.adam-eps", "1e-50"], "optim.adam_eps is computed with in float32"),
        (["--train.steps", "10000000000"], "train.steps must be at most 2147483646"),
        (["--quant.start-step", "10000000000"], "quant.start_step and quant.ramp_steps must be at most"),
    ],
)
def test_a_wrong_field_names_the_right_one(arguments, sentence, capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        launch.main(["train", *arguments, "--run", str(tmp_path / "run")])
    assert stop.value.code == EXIT_USAGE
    assert sentence in "".join(capsys.readouterr())
    assert not (tmp_path / "run").exists()


def test_a_name_with_an_at(tmp_path, monkeypatch):
    """What is there decides; where a run and a step of another are meant by one word, the step is."""
    monkeypatch.chdir(tmp_path)
    for name in ("a", "a@5", "me@home", "b@7", "c@"):
        RunDir(name).write_config(preset("tiny"), {})
    for source, path, step in (
        ("a@20", "a", 20),
        ("a@5", "a", 5),
        ("a@5@20", "a@5", 20),
        ("me@home", "me@home", None),
        ("me@home@20", "me@home", 20),
        ("b@7", "b@7", None),
        ("b@7@9", "b@7", 9),
        ("a", "a", None),
        ("a@grid", "a", preset("tiny").quant.start_step),
        ("new@3", "new", 3),
        ("7", "7", None),
        ("c@", "c@", None),
        ("c@@4", "c@", 4),
    ):
        run, found = parse_source(source)
        assert (str(run.path), found) == (path, step), source
    (tmp_path / "export@").mkdir()
    assert parse_source("export@")[0].path.name == "export@"
    with pytest.raises(ConfigError, match="a@ ends without a step"):
        parse_source("a@")
    other = dataclasses.replace(preset("tiny"), model=dataclasses.replace(preset("tiny").model, hidden_size=96))
    RunDir("me@home").write_config(other, {})
    for source in ("me@home", "me@home@20"):
        assert with_network_of(preset("tiny"), None, source).model == other.model
    assert with_network_of(preset("tiny"), "a", "gone@grid") == preset("tiny")
    assert with_network_of(other, "new", "gone@last") == other


def test_both_spellings_of_a_field():
    assert launch._dashed(["train.steps=3", "--optim.lr=0.1", "--quant.grid", "none", "--data.paths=a=b/c"]) == [
        "--train.steps",
        "3",
        "--optim.lr",
        "0.1",
        "--quant.grid",
        "none",
        "--data.paths",
        "a=b/c",
    ]
    switches = ["model.norm_topk_prob=False", "--optim.nesterov=true", "data.system=true"]
    assert launch._dashed(switches) == ["--model.no-norm-topk-prob", "--optim.nesterov", "--data.system", "true"]


def test_metrics_hold_what_the_report_shows(trained):
    rows = [r for r in trained.read_metrics() if r["kind"] == "step"]
    assert [r["step"] for r in rows] == list(range(1, 21))
    for row in rows:
        assert row["dropped_tokens"] == 0 and row["skipped_steps"] == 0 and row["mfu"] == "n/a"
        assert {
            "loss",
            "lr",
            "tokens_per_second",
            "seconds",
            "max_logit",
            "load_entropy",
            "load_max_over_mean",
            "grad_norm/experts",
            "update_rms/experts",
            "update_rms/adamw",
        } <= row.keys()
    assert 0 < rows[0]["compile_seconds"] < rows[0]["seconds_to_first_step"]
    assert [r["grid_amount"] for r in rows] == [0.0] * 4 + [1.0] * 16
    assert "grid_error" in rows[-1] and len(rows[-1]["expert_load"]) == 2
    reported = [r for r in rows if "quant/flipped" in r]
    assert [r["step"] for r in reported] == [1, 4, 8, 12, 16, 20], "the codes that this one step moved"
    assert all(0 < r["quant/flipped"] < 0.5 and r["quant/oscillating"] <= r["quant/flipped"] for r in reported)
    assert all(1 / 32 <= r["codes_at_edge"] < 0.5 for r in reported)


def test_a_trace_of_the_named_steps_is_written(trained):
    """Two steps were asked for: both calls are there, and their operations by name."""
    (file,) = trained.profile.glob("**/*.xplane.pb")
    planes = ProfileData.from_file(str(file)).planes
    names = Counter(event.name for plane in planes for line in plane.lines for event in line.events)
    assert sum(count for name, count in names.items() if "train_step" in name) >= 2
    assert sum(count for name, count in names.items() if re.fullmatch(r"(dot|while|\w*fusion)(\.\d+)?", name)) > 100


def test_export_verify_eval_generate_report(trained, capsys):
    """The main job after training, verb by verb, on one run."""
    run, export = str(trained.path), str(trained.path / "export")
    assert launch.main(["export", run]) == EXIT_DONE
    assert launch.main(["export", run]) == EXIT_USAGE, "an existing export is never overwritten"
    assert launch.main(["verify", export, "--run", run]) == EXIT_DONE
    printed = capsys.readouterr().out
    assert "sound" in printed and "compared with the training forward, 0 differ" in printed

    assert (
        launch.main(
            [
                "eval",
                "--run",
                run,
                "--problems",
                "4",
                "--lengths",
                "1",
                "2",
                "--",
                f"bf16={run}:bf16",
                f"RTN={run}@grid:rtn",
                f"GPTQ={run}@grid:gptq",
                f"QAT={export}",
            ]
        )
        == EXIT_DONE
    )
    rows = [json.loads(line) for line in (trained.path / "evals.jsonl").read_text().splitlines()]
    assert [r["arm"] for r in rows] == ["bf16", "RTN", "GPTQ", "QAT"]
    assert "experts saw fewer tokens than inputs" in capsys.readouterr().out
    assert all(0 <= share <= 1 for r in rows for share in r["exact"].values())

    assert launch.main(["generate", "7a+2=", "--weights", export, "--max-new-tokens", "8"]) == EXIT_DONE
    assert "tokens/s" in capsys.readouterr().out
    assert launch.main(["report", run]) == EXIT_DONE
    page = (trained.path / "report.md").read_text()
    assert "| QAT |" in page
    for line in page.splitlines():
        if line.startswith("!["):
            assert (trained.path / line.split("(")[1].rstrip(")")).stat().st_size > 5000


def test_a_gguf_file_holds_the_weights_it_is_asked_for(trained, tmp_path, capsys):
    """It is made of RUN/export, which may be from before training went on."""
    run = tmp_path / "run"
    shutil.copytree(trained.path, run, ignore=shutil.ignore_patterns("export"))
    assert launch.main(["export", f"{run}@grid", "--out", str(run / "export")]) == EXIT_DONE
    assert launch.main(["export", str(run), "--format", "gguf"]) == EXIT_USAGE
    error = capsys.readouterr().err
    assert "is damaged or not of step" in error and error.count("\n") == 1 and not (run / "model.gguf").exists()
    assert launch.main(["export", str(run), "--format", "bf16", "--out", str(tmp_path / "bf16")]) == EXIT_DONE
    grid = (run / "export").rename(tmp_path / "grid")
    (tmp_path / "bf16").rename(run / "export")
    assert launch.main(["export", str(run), "--format", "gguf"]) == EXIT_USAGE
    error = capsys.readouterr().err
    assert "export is a bf16 export, and a gguf file is made of an int4 one; move it away" in error and error.count("\n") == 1
    (run / "export").rename(tmp_path / "bf16")
    grid.rename(run / "export")
    pytest.importorskip("gguf", reason="needs the gguf extra")
    assert launch.main(["export", f"{run}@grid", "--format", "gguf"]) == EXIT_DONE
    assert "groups of codes as they are" in capsys.readouterr().out and (run / "model.gguf").stat().st_size > 10_000


def test_import_brings_back_what_export_wrote(trained, tmp_path, capsys):
    """INT4 out, in, out: the same bytes, and the imported run computes the same logits. An existing run is refused."""
    first, run, second = tmp_path / "first", str(tmp_path / "run"), tmp_path / "second"
    assert launch.main(["export", str(trained.path), "--out", str(first)]) == EXIT_DONE
    assert launch.main(["import", str(first), "--run", run, "--train.batch-size", "8"]) == EXIT_DONE
    assert launch.main(["import", str(first), "--run", run]) == EXIT_USAGE
    assert launch.main(["verify", str(first), "--run", run]) == EXIT_DONE
    assert launch.main(["export", run, "--out", str(second)]) == EXIT_DONE
    shutil.rmtree(RunDir(run).checkpoints)  # as one that is killed before its weights are written leaves it
    assert launch.main(["import", str(first), "--run", run]) == EXIT_USAGE
    printed = capsys.readouterr()
    assert "holds an import that is not whole" in printed.err and "probe agree to 0" in printed.out
    files = sorted(p.name for p in first.glob("*.safetensors"))
    assert files and all((first / name).read_bytes() == (second / name).read_bytes() for name in files)


def test_a_broken_import_writes_nothing(trained, tmp_path, capsys):
    broken, run = tmp_path / "broken", tmp_path / "run"
    assert launch.main(["export", str(trained.path), "--out", str(broken)]) == EXIT_DONE
    file = next(broken.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1000])
    assert launch.main(["import", str(broken), "--run", str(run)]) == EXIT_USAGE
    error = capsys.readouterr().err
    assert file.name in error and error.count("\n") == 1 and not run.exists()


def test_damage_to_an_export_is_found(trained, tmp_path, capsys):
    out = tmp_path / "export"
    assert launch.main(["export", str(trained.path), "--out", str(out)]) == EXIT_DONE
    file = next(out.glob("*.safetensors"))
    raw = bytearray(file.read_bytes())
    raw[-100] ^= 4
    file.write_bytes(raw)
    assert launch.main(["verify", str(out), "--run", str(trained.path)]) == 1
    assert "DAMAGED" in capsys.readouterr().out


def test_a_fork_shares_its_first_steps(trained, tmp_path, capsys):
    """The bf16 control of the demo: same state at the fork, other weights after it."""
    fork = str(tmp_path / "fork")
    fields = [f"{k}={v}" for k, v in FORK.items()]
    assert (
        launch.main(
            [
                "train",
                "--run",
                fork,
                "--train.fork-from",
                f"{trained.path}@grid",
                "--quant.grid",
                "none",
                "--data.task-length",
                "2",
                "3",
                *fields,
            ]
        )
        == EXIT_DONE
    )
    steps = [r["step"] for r in RunDir(fork).read_metrics() if r["kind"] == "step"]
    hashes = [{r["step"]: r["data_hash"] for r in run.read_metrics() if r["kind"] == "step"} for run in (trained, RunDir(fork))]
    assert all(hashes[0][step] == hashes[1][step] for step in steps), "the same data, the shared steps included"
    assert steps == list(range(5, 21))

    out = str(tmp_path / "rounded")
    assert launch.main(["export", fork, "--out", out]) == EXIT_DONE
    assert "were not on the INT4 grid" in capsys.readouterr().out.replace("\n", " ")
    assert launch.main(["verify", out]) == EXIT_DONE
    assert launch.main(["verify", out, "--run", fork]) == 1
    assert "NOT the weights that training used" in capsys.readouterr().out.replace("\n", " ")


FORK = {
    "model.num_hidden_layers": 3,
    "model.hidden_size": 64,
    "model.moe_intermediate_size": 32,
    "model.q_lora_rank": 32,
    "model.intermediate_size": 64,
    "model.kv_lora_rank": 32,
    "model.n_routed_experts": 8,
    "model.num_experts_per_tok": 2,
    "train.steps": 20,
    "train.batch_size": 8,
    "train.seq_len": 64,
    "train.compute_dtype": "float32",
    "train.eval_batches": 1,
}
"""tests/train/conftest.py:small, as a user would type it."""


def test_a_run_goes_on_without_the_words_that_began_it(trained, tmp_path, capsys):
    """A preset that names another start than the run had, the same source written in another way, and a source that is gone."""
    run, source = str(tmp_path / "run"), shutil.copytree(trained.path, tmp_path / "source")
    fields = [f"{k}={v}" for k, v in FORK.items() if not k.endswith("train.steps")]
    common = ["train", "--preset", "tiny_sft", "--run", run, "--data.task", "chain", "--data.task-length", "2", "3", *fields]
    begun = ["--train.init-from", "None", "--train.fork-from"]
    assert launch.main([*common, *begun, f"{source}@grid", "--train.steps", "5"]) == EXIT_DONE
    assert launch.main([*common, *begun, f"{source}/../source@grid", "--train.steps", "6"]) == EXIT_DONE
    shutil.rmtree(source)
    assert launch.main([*common, "--train.steps", "7"]) == EXIT_DONE
    assert launch.main([*common, *begun, f"{source}@3", "--train.steps", "8"]) == EXIT_USAGE
    assert "goes on from its own checkpoints, not from --train.fork-from" in capsys.readouterr().err


def test_plan_prints_the_table(capsys):
    assert launch.main(["plan", "--preset", "kimi_k2"]) == EXIT_DONE
    printed = capsys.readouterr().out
    assert "1,026,408,232,448" in printed and "moe.mlp.experts_gate_up" in printed
