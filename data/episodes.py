"""Conversations of a model with an environment: tools, or a user with more to ask.

Render, generate, parse, run, append: exactly as training rows are laid out, so that what a model sees at step k of a
live episode is the beginning of the row it was trained on (tests/data/test_episodes.py).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from data import tokenizer as tok
from data.chat import numbered, shorter_versions
from data.parse import parse_ids
from data.render import KimiRenderer, Message, Mode

Environment = Callable[[Message], list[Message]]
"""What follows an assistant message: tool results, the user's next turn, or nothing."""


@dataclass
class Bill:
    """Generated tokens by what they are."""

    thinking: int = 0
    answer: int = 0
    tool: int = 0

    def add(self, ids: Sequence[int], special: dict[str, int]) -> None:
        part = "answer"
        begins = {special[tok.THINK]: "thinking", special[tok.CALLS_BEGIN]: "tool"}
        ends = (special[tok.THINK_END], special[tok.CALLS_END])
        for i in ids:
            part = begins.get(i, part)
            setattr(self, part, getattr(self, part) + 1)
            if i in ends:
                part = "answer"


@dataclass
class Episode:
    """One conversation on its way."""

    messages: list[Message]
    environment: Environment
    declarations: Sequence[dict] = ()
    shown: list[Message] = field(init=False)
    """The messages that still stand in the model's context, where their calls count from 0; see `next_prompt`."""
    bill: Bill = field(default_factory=Bill)
    replies: int = 0
    misnumbered: int = 0
    """Calls whose id did not continue the count of the calls shown; they are renumbered, as serving engines do."""
    failures: list[str] = field(default_factory=list)
    unreadable: int = 0
    """Calls that could not be read."""
    stopped: str = ""
    """Empty while it runs. done: the environment had nothing more to say. failure: a reply was cut off or its call
    unreadable. limit: too many replies."""

    def __post_init__(self):
        self.shown = list(self.messages)

    def next_prompt(self, renderer: KimiRenderer, mode: Mode, context: int | None) -> list[int]:
        """What the next reply is generated from. Where that is more than `context` tokens, the oldest whole tool exchanges
        are left out (as data.too_long=shorten does with training rows) until it is half of that: seldom, because what
        is left has to be read again."""
        prompt = renderer.prompt(numbered(self.shown), self.declarations, mode)
        if context is None or len(prompt) <= context:
            return prompt
        versions = shorter_versions(self.shown)
        if not versions:
            return prompt
        first = bisect_left(
            versions[:-1],
            True,
            key=lambda version: len(renderer.prompt(numbered(version), self.declarations, mode)) <= context // 2,
        )
        self.shown = versions[first]
        return renderer.prompt(numbered(self.shown), self.declarations, mode)

    def add(self, messages: Sequence[Message]) -> None:
        self.messages += messages
        self.shown += messages

    @property
    def answer(self) -> str:
        """Content of the last message if the model ended there."""
        return self.messages[-1]["content"] if self.stopped == "done" else ""

    def take(self, ids: Sequence[int], renderer: KimiRenderer) -> None:
        """Go on by one generated reply and what the environment says to it."""
        self.replies += 1
        self.bill.add(ids, renderer.tokenizer.special)
        reply = parse_ids(ids, renderer.tokenizer)
        seen, number = (sum(len(message.get("tool_calls", ())) for message in some) for some in (self.shown, self.messages))
        for index, made in enumerate(reply.calls):
            self.misnumbered += made["id"] != f"functions.{made['function']['name']}:{seen + index}"
            made["id"] = f"functions.{made['function']['name']}:{number + index}"
        self.add([reply.message()])
        self.unreadable += reply.unreadable
        if reply.failures or not reply.finished:
            self.failures += reply.failures or ["the reply is not finished"]
            self.stopped = "failure"
            return
        following = self.environment(self.messages[-1])
        self.add(following)
        if not following:
            self.stopped = "done"


def run_episodes(
    generate: Callable[[dict[int, list[int]]], Mapping[int, Sequence[int]]],
    renderer: KimiRenderer,
    episodes: Sequence[Episode],
    max_replies: int = 1000,
    mode: Mode = "interleaved",
    context: int | None = None,
    watch: Callable[[Message], None] = lambda message: None,
) -> None:
    """Run episodes side by side to their ends; all that still run get one reply a round.

    generate   number of the episode -> its prompt; gives for each the ids of one reply, up to and including the stop
               token. An episode keeps its number, and a prompt goes on where the last one and its reply ended (until
               an answer blanks the thoughts before it), so the caller can keep a cache (model/decode/generate.py:Decoder)
    context    tokens of the longest prompt; see `Episode.next_prompt`
    watch      is shown every message as it arrives
    """
    for _ in range(max_replies):
        live = {number: episode for number, episode in enumerate(episodes) if not episode.stopped}
        if not live:
            return
        replies = generate({number: episode.next_prompt(renderer, mode, context) for number, episode in live.items()})
        for number, episode in live.items():
            known = len(episode.messages)
            episode.take(list(replies[number]), renderer)
            for message in episode.messages[known:]:
                watch(message)
    for episode in episodes:
        episode.stopped = episode.stopped or "limit"
