"""`launch.py generate` in the terminal: what is shown, tools by name, budgets and bills. The model is a script."""

import io
import random
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from rich.console import Console

from configs.schema import ConfigError, ModelConfig
from data.render import KimiRenderer
from data.tasks import make_problem
from data.tokenizer import load_tokenizer
from data.tools import Toolbox, call, tools_by_name
from eval import chat
from eval.screen import Screen, say
from model.decode.sampling import Sampling, choose, kept
from train.weights import load_weights

TOKENIZER = load_tokenizer("bytes")


class Script:
    """Stands for weights and decoder: streams what the rows hold, and notes the budgets it was given."""

    tokenizer, model = TOKENIZER, ModelConfig(max_position_embeddings=500)

    def __init__(self, rows, system, mode):
        self.rows, self.system, self.mode, self.budgets = rows, system, mode, []

    def decoder(self, rows, sampling):
        return self

    def stream(self, prompt, limit, budget, stats):
        assert (budget.begin, budget.end, budget.calls) in ((-1, -1, -1), (270, 271, 264))
        self.budgets.append(budget.tokens)
        row = next(row for row in self.rows if row[: len(prompt)] == prompt)
        stats.prompt_tokens, stats.read_tokens, stats.first_token_s, stats.second_token_s = len(prompt), 7, 0.5, 1.5
        for token in row[len(prompt) : row.index(TOKENIZER.eos_id, len(prompt)) + 1]:
            stats.new_tokens, stats.total_s = stats.new_tokens + 1, 0.5 + stats.new_tokens
            yield token


@pytest.fixture
def screen(monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr(
        chat, "console", Console(file=out, width=200, color_system="standard", force_terminal=True, highlight=False)
    )
    return out


def talk(monkeypatch, problem, system=None, mode="interleaved", **limits):
    """Every prompt has to be the beginning of a row that was trained with this system message and mode."""
    rows = [row.ids for row in KimiRenderer(TOKENIZER, system).rows(problem.messages, problem.tools, mode)]
    script = Script(rows, system, mode)
    monkeypatch.setattr(chat, "load_weights", lambda source: script)
    monkeypatch.setattr(chat, "make_problem", lambda *args, **kwargs: problem)
    assert (
        chat.generate("W", "", raw=False, task="pointer_chase", length=3, tools=(), limits=chat.Limits(**limits), sampling=None)
        == 0
    )
    return script


def test_a_tool_loop_on_the_screen(monkeypatch, screen):
    problem = make_problem("pointer_chase", 0, 0, 3)
    talk(monkeypatch, problem)
    shown = screen.getvalue()
    key = problem.messages[0]["content"]
    assert f"\x1b[2m{key[0]}\x1b[0m" in shown, "thoughts are dimmed"
    assert "\x1b[1;36mf\x1b[0m" in shown, "calls are highlighted"
    assert f"result  {problem.messages[2]['content']}" in shown
    tokens = KimiRenderer(TOKENIZER).rows(problem.messages, problem.tools)[0].trained
    assert (
        f"= {tokens} new tokens in 4 replies; 28 prompt tokens read; first token after 0.50 s with compiling, then 1.0 tokens/s"
    ) in shown
    assert "28 thinking + 5 answer" in shown  # three keys of 6, `=` and a digit, 8 marks; a digit and 4 ends of message
    assert f"right: the answer is {problem.answer}" in shown


@pytest.mark.parametrize("system", [None, "You are exact."])
@pytest.mark.parametrize("mode", ["interleaved", "preserved", "last_segment"])
def test_weights_are_asked_as_they_were_trained(monkeypatch, screen, system, mode):
    problem = make_problem("dict_sum", 0, 0, 1 if mode == "last_segment" else 4)
    talk(monkeypatch, problem, system, mode)
    assert f"right: the answer is {problem.answer}" in screen.getvalue()


def test_the_budget_of_thoughts_is_for_the_whole_conversation(monkeypatch, screen):
    script = talk(monkeypatch, make_problem("pointer_chase", 0, 0, 3), thinking=20)
    assert script.budgets == [20, 12, 4, 0]  # each thought costs six letters and two marks


def test_a_conversation_longer_than_the_model_is_meant_for_is_noted(monkeypatch, screen):
    talk(monkeypatch, make_problem("pointer_chase", 0, 0, 3), reply=400)
    assert "positions, and the model is meant for 500" in screen.getvalue()


@pytest.mark.parametrize("context, notes", [(None, 0), (300, 4), (1000, 0)])
def test_a_prompt_that_cannot_be_shortened_is_noted(monkeypatch, screen, context, notes):
    """The tool's declaration alone takes more than 44 tokens."""
    if notes:
        monkeypatch.setattr("data.episodes.shorter_versions", lambda messages: [])
    talk(monkeypatch, make_problem("pointer_chase", 0, 0, 3), context=context)
    assert screen.getvalue().count("--context 300 has room for 44 beside a reply") == notes


def test_failures_and_limits_are_said(monkeypatch, screen):
    problem = make_problem("pointer_chase", 0, 0, 3)
    talk(monkeypatch, problem, replies=2)
    assert "stopped after 2 replies" in screen.getvalue() and "wrong: the answer is" in screen.getvalue()


def test_characters_of_several_bytes_arrive_whole():
    out = io.StringIO()
    shown = Screen(Console(file=out, width=80, highlight=False), TOKENIZER)
    for token in [
        *TOKENIZER.encode("é漢🙂 [bold]"),
        0xFF,
        *TOKENIZER.encode("x"),
        TOKENIZER.special["<think>"],
        *TOKENIZER.encode("hm"),
        TOKENIZER.special["</think>"],
        TOKENIZER.eos_id,
    ]:
        shown.token(token)
    shown.end_of_reply()
    assert out.getvalue() == "é漢🙂 [bold]\ufffdxthoughts  hm\n"


def byte_fallback(path):
    """A tokenizer file of the older kind: words with their space in front, all else in bytes that are decoded together."""
    pieces = [("<unk>", 0.0), *((f"<0x{i:02X}>", -9.0) for i in range(256)), ("\u2581", -2.0), ("\u2581the", -1.0), ("a", -3.0)]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, 0, byte_fallback=True))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    tokenizer.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("\u2581", " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
            tokenizers.decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.save(str(path))
    return load_tokenizer(str(path))


def test_a_token_costs_the_same_at_any_length_and_the_text_is_that_of_all(tmp_path, monkeypatch):
    """Sound characters of several bytes under both kinds of tokenizer; broken ones under bytes, where each stands alone."""
    rng = random.Random(0)
    texts = ["".join(rng.choice(alphabet) for _ in range(300)) for alphabet in ("aé漢🙂 \ufffdthe", "漢🙂") for _ in range(20)]
    old = byte_fallback(tmp_path / "tokenizer.json")
    cases = [(tokenizer, tokenizer.encode(text)) for tokenizer in (TOKENIZER, old) for text in texts]
    cases += [(TOKENIZER, rng.choices(range(low, 256), k=500)) for low in (0, 0x60, 0x80, 0xC0, 0xFF) for _ in range(10)]

    def streamed(tokenizer, ids):
        """(what is printed, the most tokens decoded together)"""
        shown, asked, decode = [], [], tokenizer.decode
        screen = Screen(
            SimpleNamespace(is_terminal=False, print=lambda made, **_: shown.extend(s.text for s in made.segments)), tokenizer
        )
        with monkeypatch.context() as patch:
            patch.setattr(tokenizer, "decode", lambda some: asked.append(len(some)) or decode(some))
            for token in ids:
                screen.token(token)
            screen.end_of_reply()
        return "".join(shown).removesuffix("\n"), max(asked)

    for tokenizer, ids in cases:
        text, most = streamed(tokenizer, ids)
        assert text == tokenizer.decode(ids).removesuffix("\n") and most <= 65


WILD = ":smile: [b][/x]\ta\tb\r\n\x07\x1b[2J\x9b1m" + "long " * 30


@pytest.mark.parametrize(
    "terminal, shown",
    [(False, WILD), (True, WILD.replace("\r", r"\r").replace("\x07", r"\x07").replace("\x1b", r"\x1b").replace("\x9b", r"\x9b"))],
)
def test_what_is_said_is_not_rewritten(terminal, shown, monkeypatch):
    """But a terminal gets no commands."""
    out = io.StringIO()
    console = Console(file=out, width=80, highlight=False, force_terminal=terminal, color_system=None)
    screen = Screen(console, TOKENIZER)
    screen.message({"role": "user", "content": WILD})
    for token in TOKENIZER.encode(WILD):
        screen.token(token)
    screen.end_of_reply()
    say(console, WILD)
    assert out.getvalue() == f"user  {shown}\n{shown}\n{shown}"


def test_a_text_is_gone_on_with_as_it_stands(monkeypatch):
    """--raw: the prompt, too, is printed as it was given."""
    out = io.StringIO()
    monkeypatch.setattr(chat, "console", Console(file=out, width=80, highlight=False))
    weights = SimpleNamespace(
        tokenizer=TOKENIZER,
        model=ModelConfig(),
        decoder=lambda rows, sampling: SimpleNamespace(stream=lambda prompt, limit, stats: iter(TOKENIZER.encode("\t:ok:"))),
    )
    monkeypatch.setattr(chat, "load_weights", lambda source: weights)
    chat.generate("W", ":smile:\tx", raw=True, task="", length=0, tools=(), limits=chat.Limits(), sampling=None)
    assert out.getvalue().startswith(":smile:\tx\t:ok:\n")


@pytest.mark.parametrize("temperature", [1e-45, 1e-38, 1e-30, 1.0])
def test_the_best_token_has_a_logit_at_any_temperature(temperature):
    logits, sampling = jnp.array([[1.0, 5.0, 9.0, 3.0]]), Sampling(temperature=temperature)
    left = np.asarray(kept(logits, sampling))[0]
    assert left[2] == 0 and not np.isnan(left).any()
    if temperature < 1:
        assert choose(logits, jnp.array([3]), sampling, False).tolist() == [2]


def test_tools_by_name(tmp_path, monkeypatch):
    (tmp_path / "mine_too.py").write_text("def double(x: int) -> int:\n    'Twice x.'\n    return 2 * x\nname = 'x'\n")
    monkeypatch.chdir(tmp_path)
    assert [t.name for t in tools_by_name(("calculator", "key_value", "mine_too:double"))] == [
        "calculate",
        "get",
        "put",
        "double",
    ]
    assert [t.name for t in tools_by_name(("mine_too.py",))] == ["double"]
    for name, words in (
        ("calc", "name calculator, key_value, MODULE:FUNCTION or FILE.py"),
        ("mine_too:nothing", "nothing"),
        ("nowhere_:f", "No module"),
        ("mine_too:name", "is str, not a function"),
        ("math:hypot", "tool hypot: no signature found"),
        (":f", "--tools :f: Empty module name"),
    ):
        with pytest.raises(ConfigError, match=words):
            tools_by_name((name,))
    with pytest.raises(ConfigError, match="two tools named double"):
        tools_by_name(("mine_too.py", "mine_too:double"))
    (tmp_path / "program_too.py").write_text("import sys\ndef f(x: int) -> int:\n    sys.exit(x)\nsys.exit(0)\n")
    for name in ("program_too.py", "program_too:f"):
        with pytest.raises(ConfigError, match="program_too.* it ends the program .sys.exit."):
            tools_by_name((name,))
    (tmp_path / "ends.py").write_text("import sys\ndef f(x: int) -> int:\n    sys.exit(x)\n")
    (result,) = Toolbox(tools_by_name(("ends.py",))).results({"tool_calls": [call(0, "f", x=3)]})
    assert result["content"] == "error: it ends the program (sys.exit)"


def test_what_cannot_be_asked():
    common = dict(raw=False, task="chain", length=3, tools=(), limits=chat.Limits(), sampling=None)
    for text, change, words in (
        ("", {"tools": ("calculator",)}, "a prompt of your own"),
        ("", {"raw": True}, "give one"),
        ("q", {}, "--task and --length choose a problem"),
        ("q", {"task": "", "length": 0, "raw": True, "tools": ("nonsense",)}, "no conversation for --tools"),
        (
            "q",
            {"task": "", "length": 0, "raw": True, "limits": chat.Limits(thinking=3, context=999)},
            "--think-budget, --context",
        ),
        ("", {"length": 10**6}, "1 to 676 steps"),
        ("", {"task": "chase"}, "does not exist"),
    ):
        with pytest.raises(ConfigError, match=words):
            chat.generate("W", text, **common | change)
    for limits, words in (
        (dict(thinking=-1), "--think-budget"),
        (dict(context=200), "no room"),
        (dict(replies=0), "--max-replies must be at least 1, not 0"),
    ):
        with pytest.raises(ConfigError, match=words):
            chat.Limits(**limits)
    for seed in (3_000_000_000, -(2**31) - 1):
        with pytest.raises(ConfigError, match="seed must lie in"):
            Sampling(seed=seed).check()
    with pytest.raises(ConfigError, match="'' names no weights; give a run directory"):
        load_weights("")
