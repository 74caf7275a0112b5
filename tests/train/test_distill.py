"""A distilled run from the command line: who its teacher is, that it is kept, and that resuming changes no bit. Scales that
learn from the same KL."""

import re
import shutil

import jax
import numpy as np

import launch
from data.pipeline import open_data
from model.transformer import param_specs
from quant.ptq import nearest
from tests.train.test_resume import final_state, losses
from train.baselines import served_plain
from train.run_dir import RunDir
from train.scale_learning import learned_scales
from train.session import load_params, open_session
from train.state import as_teacher

FORK = ["--quant.distill-weight", "0.5", "--train.steps", "8", "--train.checkpoint-every", "2", "--train.keep", "9"]


def arguments(run, source, *more):
    """`small` by its fields: the same network as the fixture's."""
    model = {
        "num_hidden_layers": 3,
        "hidden_size": 64,
        "moe_intermediate_size": 32,
        "q_lora_rank": 32,
        "intermediate_size": 64,
        "kv_lora_rank": 32,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
    }
    words = [word for name, value in model.items() for word in (f"--model.{name.replace('_', '-')}", str(value))]
    return [
        "train",
        "--run",
        str(run),
        *words,
        "--quant.start-step",
        "4",
        "--data.task-length",
        "2",
        "3",
        "--train.batch-size",
        "8",
        "--train.seq-len",
        "64",
        "--train.compute-dtype",
        "float32",
        "--train.eval-batches",
        "1",
        "--train.fork-from",
        f"{source}@grid",
        *more,
    ]


def test_a_distilled_fork_resumes_bit_for_bit(trained, tmp_path):
    run, again = RunDir(tmp_path / "run"), RunDir(tmp_path / "again")
    source = shutil.copytree(trained.path, tmp_path / "source")
    assert launch.main(arguments(run.path, source, *FORK)) == 0
    whole = final_state(run)
    fork = load_params(open_session(trained.load_config()), trained, 4)[0]
    jax.tree.map(
        np.testing.assert_array_equal,
        whole.state.teacher,
        as_teacher(fork, trained.load_config(), param_specs(trained.load_config().model)),
    )
    assert whole.state.teacher["embed"].dtype == "bfloat16"

    shutil.copytree(run.path, again.path)
    for step in (7, 8):
        shutil.rmtree(again.checkpoints / str(step), ignore_errors=True)
    shutil.rmtree(source)
    assert launch.main(arguments(again.path, source, *FORK)) == 0, "the teacher is in the run's own checkpoints"
    parts = final_state(again)
    assert parts.step == whole.step == 8
    jax.tree.map(np.testing.assert_array_equal, whole.state, parts.state)
    assert losses(run) == losses(again)
    distances = [r["teacher_kl"] for r in run.read_metrics() if r["kind"] == "step"]
    assert distances and all(0 < kl < 1 for kl in distances)


def test_without_a_run_to_learn_from_it_is_one_sentence(tmp_path, capsys):
    assert launch.main(["train", "--run", str(tmp_path / "run"), "--quant.distill-weight", "0.5"]) == 2
    assert "name its run with --train.fork-from" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_learned_scales_bring_the_model_closer_to_itself(trained):
    """The baseline lsq: searched scales first, then two batches four times, by the KL to the unquantised model."""
    session = open_session(trained.load_config())
    params, _ = load_params(session, trained)
    arm = learned_scales(session, params, served_plain(session, params), open_data(session.cfg, session.tokenizer), 2, "mse3")
    before, after = (float(word.rstrip(";")) for word in re.findall(r"(\S+) in the (?:first|last)", arm.notes[0]))
    assert 0 < after < before
    start = nearest(params, session.specs, 32, "mse3")
    for path, codes in arm.codes.items():
        assert int(codes.min()) >= -4 and int(codes.max()) <= 3
        moved = np.asarray(arm.scales[path] / start.scales[path])
        assert (moved != 1).any() and moved.min() > 0.9 and moved.max() < 1.1, "eight steps of at most 1 %"
