"""The tokenizer and chat template that an export carries, judged by transformers."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from data.messages import conversation
from data.render import KimiRenderer
from data.tasks import TASKS, make_problem
from data.tokenizer import SPECIAL_NAMES, load_tokenizer

OURS = load_tokenizer("bytes")
CASES = [json.loads(line) for line in (Path(__file__).parents[1] / "data" / "golden_prompts.jsonl").read_text().splitlines()]


SYSTEM = 'You are small, "quick"\nand exact.'


@pytest.fixture(
    scope="module", params=[(None, "interleaved"), (SYSTEM, "interleaved"), (SYSTEM, "preserved"), (None, "preserved")]
)
def saved(request, tmp_path_factory):
    """(transformers' tokenizer of a saved folder, our renderer with the same default system message, the mode)."""
    folder = tmp_path_factory.mktemp("tokenizer")
    system, mode = request.param
    OURS.save(folder, system, mode)
    return AutoTokenizer.from_pretrained(folder), KimiRenderer(OURS, system), mode


def test_special_tokens_and_text(saved):
    theirs, *_ = saved
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (OURS.bos_id, OURS.eos_id, OURS.pad_id)
    assert {name: theirs.convert_tokens_to_ids(name) for name in SPECIAL_NAMES} == OURS.special
    for text in ("plain", " ÄÖ 漢字 🙂\n\n\t x", ""):
        ids = theirs(text, add_special_tokens=True)["input_ids"]
        assert ids == OURS.encode(text) and theirs.decode(ids) == text
    assert len(theirs) <= OURS.vocab_size


def test_chat_template_writes_what_the_renderer_writes(saved):
    theirs, renderer, mode = saved
    compared = 0
    for case in CASES:
        messages = case["messages"][case["messages"][0]["role"] == "system" :]
        if not messages:
            continue
        prompt = renderer.prompt(messages, case["tools"], mode)
        text = theirs.apply_chat_template(messages, tools=case["tools"] or None, tokenize=False, add_generation_prompt=True)
        assert text == OURS.decode(prompt)
        compared += 1
    assert compared > 40


def test_a_row_trains_the_history_that_engines_write(saved):
    """vLLM makes an object of a call's arguments, which a client sends as text, before the template sees them."""
    theirs, renderer, mode = saved
    given = [r'{"b":[1,2.50,1e5,null],"a":{"\u00fc":"\u2028\n\/"}}', "{ }"]

    def asked(*arguments):
        calls = [
            {"id": f"functions.f:{i}", "type": "function", "function": {"name": "f", "arguments": value}}
            for i, value in enumerate(arguments)
        ]
        results = [{"role": "tool", "tool_call_id": call["id"], "name": "f", "content": "7"} for call in calls]
        return [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": calls}, *results]

    text = theirs.apply_chat_template(asked(*map(json.loads, given)), tokenize=False, add_generation_prompt=True)
    assert text == OURS.decode(renderer.prompt(conversation({"messages": asked(*given)}).messages, mode=mode))


@pytest.mark.parametrize("task", TASKS)
def test_chat_template_gives_the_ids_of_training_rows(saved, task):
    """Live steps of a problem through transformers are prefixes of the training row, token for token."""
    theirs, renderer, mode = saved
    problem = make_problem(task, 0, 0, 4)
    rows = iter(renderer.rows(problem.messages, problem.tools, mode))
    row = next(rows)
    for index, message in enumerate(problem.messages):
        if message["role"] != "assistant":
            continue
        if index >= row.end:
            row = next(rows)
        ids = theirs.apply_chat_template(
            list(problem.messages[:index]),
            tools=list(problem.tools) or None,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=False,
        )
        assert ids == row.ids[: len(ids)]
