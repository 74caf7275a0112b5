"""`launch.py generate`: one answer in the terminal, with tools if there are any, and its bill."""

from __future__ import annotations

import random
from dataclasses import dataclass

from configs.schema import require
from data import tokenizer as tok
from data.episodes import Bill, Episode, run_episodes
from data.problem import Problem
from data.render import KimiRenderer
from data.tasks import check, make_problem
from data.tools import Toolbox, tools_by_name
from eval.screen import Screen, say
from model.decode.generate import Decoder, Stats, tokens_per_s
from model.decode.sampling import UNLIMITED, Budget, Sampling
from train.console import console
from train.weights import Weights, load_weights


@dataclass(frozen=True)
class Limits:
    """Where a conversation stops at the latest.

    reply     tokens of one reply. replies: of the conversation
    thinking  tokens of thought in the whole conversation, then empty thoughts; None: no limit
    context   tokens of a prompt and its reply; the oldest tool exchanges are left out. None: everything is shown
    """

    reply: int = 256
    replies: int = 1000
    thinking: int | None = None
    context: int | None = None

    def __post_init__(self):
        require(self.reply >= 1, f"--max-new-tokens must be at least 1, not {self.reply}")
        require(self.replies >= 1, f"--max-replies must be at least 1, not {self.replies}")
        require(self.thinking is None or self.thinking >= 0, f"--think-budget cannot be {self.thinking}")
        require(
            self.context is None or self.context > self.reply,
            f"--context {self.context} leaves no room beside replies of --max-new-tokens {self.reply}",
        )


def generate(
    source: str, text: str, *, raw: bool, task: str, length: int, tools: tuple[str, ...], limits: Limits, sampling: Sampling
) -> int:
    """Print the reply to `text`, or, without one, to a held-out problem of a built-in task (a chain of 5 steps); `raw` goes on
    with the text as it stands."""
    require(not (tools and not text), "--tools are for a prompt of your own; a built-in task brings its tools along")
    require(not (text and (task or length)), "--task and --length choose a problem to ask; leave them out beside a prompt")
    framed = {"--tools": tools, "--think-budget": limits.thinking is not None, "--context": limits.context is not None}
    unused = [flag for flag, given in framed.items() if given]
    require(not (raw and unused), f"--raw goes on with a text and has no conversation for {', '.join(unused)}")
    text = text.encode("utf-8", "replace").decode()  # a shell hands over bytes that are no UTF-8 as lone surrogates
    problem, offered = None, tools_by_name(tools)
    if not text:
        require(not raw, "--raw continues a text: give one as the prompt")
        problem = make_problem(task or "chain", seed=0, index=random.randrange(1 << 30), length=length or 5)
    weights = load_weights(source)
    decoder = weights.decoder(1, sampling)
    if raw:
        return _continue(weights, decoder, text, limits.reply)
    if problem:
        episode = problem.episode()
    else:
        episode = Episode([{"role": "user", "content": text}], Toolbox(offered).results, [t.declaration for t in offered])
    _converse(weights, decoder, episode, limits)
    if problem:
        _judge(problem, episode)
    return 0


def _continue(weights: Weights, decoder: Decoder, text: str, limit: int) -> int:
    prompt = [weights.tokenizer.bos_id, *weights.tokenizer.encode(text)]
    screen, stats = Screen(console, weights.tokenizer), Stats()
    _note_length(weights, len(prompt) + limit)
    say(console, text, "bold")
    for token in decoder.stream(prompt, limit, stats=stats):
        screen.token(token)
    screen.end_of_reply()
    console.print(f"{stats.prompt_tokens} prompt tokens, {stats.new_tokens} new, {_pace(stats)}", style="dim")
    return 0


def _note_length(weights: Weights, positions: int) -> None:
    promised = weights.model.max_position_embeddings
    if positions > promised:
        console.print(
            f"note: prompt and reply may reach {positions} positions, and the model is meant for {promised}", style="yellow"
        )


def _pace(*replies: Stats) -> str:
    return f"first token after {replies[0].first_token_s:.2f} s with compiling, then {tokens_per_s(*replies):.1f} tokens/s"


def _converse(weights: Weights, decoder: Decoder, episode: Episode, limits: Limits) -> None:
    screen, special = Screen(console, weights.tokenizer), weights.tokenizer.special
    replies: list[Stats] = []

    def reply(prompts: dict[int, list[int]]) -> dict[int, list[int]]:
        budget, stats, ids = UNLIMITED, Stats(), []
        _note_length(weights, len(prompts[0]) + limits.reply)
        if context is not None and len(prompts[0]) > context:  # the oldest tool exchanges are left out already
            console.print(
                f"note: this prompt has {len(prompts[0])} tokens, and nothing of it can be left out; --context "
                f"{limits.context} has room for {context} beside a reply",
                style="yellow",
            )
        if limits.thinking is not None:
            left = max(0, limits.thinking - episode.bill.thinking)
            budget = Budget(special[tok.THINK], special[tok.THINK_END], special[tok.CALLS_BEGIN], left)
        for token in decoder.stream(prompts[0], limits.reply, budget, stats):
            screen.token(token)
            ids.append(token)
        screen.end_of_reply()
        replies.append(stats)
        return {0: ids}

    for message in episode.messages:
        screen.message(message)
    context = None if limits.context is None else limits.context - limits.reply
    run_episodes(
        reply, KimiRenderer(weights.tokenizer, weights.system), [episode], limits.replies, weights.mode, context, screen.message
    )
    for failure in episode.failures:
        say(console, f"stopped: {failure}\n", "red")
    if episode.stopped == "limit":
        console.print(f"stopped after {limits.replies} replies", style="red")
    console.print(bill(episode.bill, replies), style="dim", markup=False)


def bill(spent: Bill, replies: list[Stats]) -> str:
    """What a conversation cost, in one line."""
    new = sum(r.new_tokens for r in replies)
    return (
        f"{spent.thinking} thinking + {spent.answer} answer + {spent.tool} tool = {new} new tokens in {len(replies)} "
        f"replies; {sum(r.read_tokens for r in replies)} prompt tokens read; {_pace(*replies)}"
    )


def _judge(problem: Problem, episode: Episode) -> None:
    right = episode.stopped == "done" and check(problem, episode.messages)
    console.print(
        f"{'right' if right else 'wrong'}: the answer is {problem.answer}", style="green" if right else "red", markup=False
    )
