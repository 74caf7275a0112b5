"""When a plan leaves the compiler, and what it says of one that fails. No compiler for other chips is needed here."""

import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from configs.schema import ConfigError
from train.compat import compile_with, known_options
from train.plan.compiler import DECISIONS, SETTLED, _decided, _receive
from train.plan.topology import topology

ROOT = Path(__file__).parents[2]

MODULE = "module_0000.jit_train_step.cl_1."


def written(folder, ending, text="Total bytes: 1", ago=2 * SETTLED):
    file = folder / (MODULE + ending)
    file.write_text(text)
    os.utime(file, (time.time() - ago,) * 2)


def test_a_program_is_decided_when_all_of_it_is_written_and_rests(tmp_path):
    """Not while a file is missing or empty, not right after a write, and not by files of another program."""
    assert not _decided(tmp_path)
    for ending in DECISIONS:
        (tmp_path / f"module_0001.jit_other.cl_1.{ending}").write_text("Total bytes: 1")
    for ending in DECISIONS:
        assert not _decided(tmp_path)
        written(tmp_path, ending)
    assert _decided(tmp_path)
    written(tmp_path, DECISIONS[0], ago=SETTLED / 2)
    assert not _decided(tmp_path)
    written(tmp_path, DECISIONS[0], text="")
    assert not _decided(tmp_path)


def test_no_report_of_memory_is_no_decision(tmp_path):
    """The report is read where there is no program to ask, so its total must be there."""
    for ending in DECISIONS:
        written(tmp_path, ending, text="HloModule jit_train_step")
    assert not _decided(tmp_path)


@pytest.mark.parametrize(
    "last_word, sentence",
    [("v5p-4 cannot run this step: why", "cannot run this step: why"), (None, "ended without a word; is there enough memory")],
)
def test_a_compiler_that_fails_is_one_sentence(last_word, sentence):
    here, there = multiprocessing.Pipe(duplex=False)
    if last_word:
        there.send(last_word)
    there.close()
    with pytest.raises(ConfigError, match=sentence):
        _receive(here, topology("v5p-4"))


def test_options_of_other_versions_are_left_out():
    """An option that this compiler does not know is no reason to fail; anything else still is."""
    lowered = jax.jit(lambda x: x + 1).lower(jnp.zeros(()))
    known = {"xla_backend_optimization_level": 1}
    assert compile_with(lowered, known | {"xla_never_heard_of": True, "xla_nor_of_this": 0})(jnp.zeros(())) == 1
    assert known_options(known | {"xla_never_heard_of": True}) == known
    with pytest.raises(Exception, match="xla_backend_optimization_level"):
        compile_with(lowered, {"xla_backend_optimization_level": "not a number"})


KILLED = """
import multiprocessing, os, threading, time
from train.plan.compiler import _end_with

def work():
    threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()
    print(os.getpid(), flush=True)
    time.sleep(600)

if __name__ == "__main__":
    multiprocessing.get_context("spawn").Process(target=work, daemon=True).start()
    time.sleep(600)
"""


def test_a_killed_plan_leaves_no_compiler_behind(tmp_path):
    """The pipe closes when the last of both processes is gone."""
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    parent = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, text=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    child = int(parent.stdout.readline())
    os.kill(child, 0)
    parent.kill()
    assert parent.communicate(timeout=60)[0] == ""
