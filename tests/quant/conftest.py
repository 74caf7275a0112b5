"""An undamaged export, and a copy of it for each test."""

import shutil

import pytest

from data.tokenizer import ByteTokenizer
from quant.evidence import Probe
from quant.export import export_model
from quant.source import InMemory
from tests.quant.damage import LOGITS, SPECS, TOKENS, WEIGHTS
from tests.quant.small_model import INT4, MODEL


@pytest.fixture(scope="session")
def pristine(tmp_path_factory):
    directory = tmp_path_factory.mktemp("damage") / "int4"
    export_model(InMemory(WEIGHTS), SPECS, MODEL, INT4, directory, tokenizer=ByteTokenizer(), probe=Probe.of(TOKENS, LOGITS))
    return directory


@pytest.fixture
def copy(pristine, tmp_path):
    return shutil.copytree(pristine, tmp_path / "copy")
