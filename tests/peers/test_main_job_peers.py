"""The main job judged from outside: train with the command line, export, and let transformers read and run the result."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import launch
from tests.model.networks import forward_logits
from train.weights import load_weights


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The tiny preset after 12 steps, its experts on the grid for the last six."""
    run = str(tmp_path_factory.mktemp("job") / "run")
    assert (
        launch.main(
            [
                "train",
                "--run",
                run,
                "--train.steps",
                "12",
                "--quant.start-step",
                "6",
                "--train.batch-size",
                "8",
                "--train.eval-batches",
                "1",
            ]
        )
        == 0
    )
    assert launch.main(["export", run]) == 0
    assert launch.main(["verify", f"{run}/export", "--run", run]) == 0
    return run


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-4), ("bfloat16", 1e-2)])
def test_transformers_computes_what_the_training_forward_computes(run, dtype, tolerance):
    """Logits of the exported directory in transformers against our forward of the run's grid weights, as a share of the
    largest logit. In bfloat16 the two round at different places; the mean over all logits is compared, because one
    near-tie in routing may send a token to another expert."""
    masters = load_weights(f"{run}:int4", dtype=dtype)
    tokens = np.random.default_rng(0).integers(0, 256, (4, 32))
    ours = forward_logits(masters.model, masters.params, tokens, masters.platform, dtype)
    model, report = AutoModelForCausalLM.from_pretrained(
        f"{run}/export", dtype=torch.bfloat16, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    model = torch.nn.Module.to(model.eval(), getattr(torch, dtype))
    with torch.no_grad():
        theirs = model(torch.from_numpy(tokens)).logits.float().numpy()
    difference = np.abs(ours - theirs) / np.abs(theirs).max()
    assert theirs.std() > 0.1
    assert (difference.max() if dtype == "float32" else difference.mean()) <= tolerance, (difference.max(), difference.mean())


def test_generated_text_is_the_same(run):
    """Greedy tokens from the exported files, ours against transformers', in float32."""
    weights = load_weights(f"{run}/export", dtype="float32")
    prompt = weights.tokenizer.encode("7k+2l-3=")
    ours = weights.decoder(1).reply({0: prompt}, 12)[0]
    model = AutoModelForCausalLM.from_pretrained(f"{run}/export", dtype=torch.bfloat16, attn_implementation="eager")
    model = torch.nn.Module.to(model.eval(), torch.float32)
    theirs = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[0, len(prompt) :].tolist()
    assert ours == theirs[: len(ours)]


def test_the_directory_is_complete(run):
    from pathlib import Path

    export = Path(run) / "export"
    for name in (
        "config.json",
        "generation_config.json",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "README.md",
        "evidence.json",
    ):
        assert (export / name).stat().st_size > 0
    assert json.loads((export / "config.json").read_text())["model_type"] == "deepseek_v3"
