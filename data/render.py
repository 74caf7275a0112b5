"""Kimi's conversation format: messages to token ids, with the loss weight of every token set while it is written.

Spans are never searched for afterwards, and text is encoded apart from the special tokens around it, so no merge of
the tokenizer can straddle the edge of a mask. Thoughts are kept or blanked as K2-Thinking's serving does: everything
up to the last assistant message without tool calls is history, whose thoughts appear as an empty pair.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from data import tokenizer as tok
from data.tokenizer import Tokenizer

Message = dict[str, Any]
Mode = Literal["interleaved", "preserved", "last_segment"]
"""interleaved: one row per segment, as it was generated. preserved: one row, no thought blanked. last_segment: the last
row of interleaved."""


@dataclass(frozen=True)
class LossWeights:
    """Loss weights of what the assistant wrote."""

    think: float = 1.0
    content: float = 1.0
    tool: float = 1.0


@dataclass
class Rendered:
    """Token ids and, for each, the weight of its prediction (0: context only). `end` messages were rendered."""

    ids: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    end: int = 0

    def add(self, ids: Sequence[int], weight: float = 0.0) -> None:
        self.ids.extend(ids)
        self.weights.extend([weight] * len(ids))

    @property
    def trained(self) -> int:
        return int(np.count_nonzero(self.weights))


def text_of(content: str | list | None) -> str:
    """Text of an OpenAI `content`: a string, a list of parts, or nothing. Never the list written out."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part.get("type") == "text")


def arguments_text(arguments: str | dict) -> str:
    """A call's arguments as they stand in the text: strings as given, objects as JSON, as the chat template writes them.
    ValueError for numbers that JSON cannot hold."""
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False, allow_nan=False)


def is_answer(message: Message) -> bool:
    """An assistant message that makes no call: it ends a segment."""
    return message["role"] == "assistant" and not message.get("tool_calls")


def segment_ends(messages: Sequence[Message]) -> list[int]:
    """Index just behind each segment: behind every answer, and at the end if calls are still open there."""
    ends = [i + 1 for i, message in enumerate(messages) if is_answer(message)]
    rest = messages[ends[-1] if ends else 0 :]
    if any(message["role"] == "assistant" for message in rest):
        ends.append(len(messages))
    return ends


class KimiRenderer:
    """Renders for one tokenizer. `system` is inserted where a conversation brings no system message, unless None."""

    def __init__(self, tokenizer: Tokenizer, system: str | None = None, weights: LossWeights = LossWeights()):
        self.tokenizer = tokenizer
        self.system = system
        self.weights = weights

    def rows(
        self, messages: Sequence[Message], tools: Sequence[dict] | None = None, mode: Mode = "interleaved"
    ) -> list[Rendered]:
        """Training rows of a conversation; rows without any trained token are left out (the caller counts them)."""
        if mode == "preserved":
            rows = [self._render(messages, tools, keep_from=0, train_from=0)]
        else:
            ends = segment_ends(messages)
            starts = [0, *ends[:-1]]
            rows = [self._render(messages[:end], tools, keep_from=start, train_from=start) for start, end in zip(starts, ends)]
            if mode == "last_segment":
                rows = rows[-1:]
        return [row for row in rows if row.trained]

    @staticmethod
    def segments(messages: Sequence[Message], mode: Mode = "interleaved") -> int:
        """How many rows there would be if all of them trained something."""
        return len(segment_ends(messages)) if mode == "interleaved" else 1

    def prompt(self, messages: Sequence[Message], tools: Sequence[dict] | None = None, mode: Mode = "interleaved") -> list[int]:
        """Ids from which the next assistant message is generated, its header included."""
        answers = [i for i, message in enumerate(messages) if is_answer(message)]
        keep_from = 0 if mode == "preserved" or not answers else answers[-1] + 1
        row = self._render(messages, tools, keep_from, train_from=len(messages))
        self._header(row, tok.IM_ASSISTANT, "assistant")
        return row.ids

    def _render(self, messages: Sequence[Message], tools: Sequence[dict] | None, keep_from: int, train_from: int) -> Rendered:
        row = Rendered(end=len(messages))
        if tools:
            declared = json.dumps(list(tools), ensure_ascii=False, sort_keys=True, separators=(",", ":"))
            self._context(row, tok.IM_SYSTEM, "tool_declare", declared)
        if self.system is not None and messages and messages[0]["role"] != "system":
            self._context(row, tok.IM_SYSTEM, "system", self.system)
        for index, message in enumerate(messages):
            role, content = message["role"], text_of(message.get("content"))
            name = message.get("name") or role
            if role == "assistant":
                train = index >= train_from and message.get("train", True)
                self._assistant(row, message, keep=index >= keep_from, train=train)
            elif role == "tool":
                self._context(row, tok.IM_SYSTEM, name, f"## Return of {message['tool_call_id']}\n{content}")
            else:
                self._context(row, tok.IM_USER if role == "user" else tok.IM_SYSTEM, name, content)
        return row

    def _header(self, row: Rendered, role_token: str, name: str) -> None:
        special = self.tokenizer.special
        row.add([special[role_token], *self.tokenizer.encode(name), special[tok.IM_MIDDLE]])

    def _context(self, row: Rendered, role_token: str, name: str, body: str) -> None:
        self._header(row, role_token, name)
        row.add([*self.tokenizer.encode(body), self.tokenizer.special[tok.IM_END]])

    def _assistant(self, row: Rendered, message: Message, keep: bool, train: bool) -> None:
        encode, special = self.tokenizer.encode, self.tokenizer.special
        weights = self.weights if train else LossWeights(0.0, 0.0, 0.0)
        self._header(row, tok.IM_ASSISTANT, message.get("name") or "assistant")
        thoughts = encode(message.get("reasoning_content") or "") if keep else []
        row.add([special[tok.THINK], *thoughts, special[tok.THINK_END]], weights.think)
        row.add(encode(text_of(message.get("content"))), weights.content)
        if message.get("tool_calls"):
            row.add([special[tok.CALLS_BEGIN]], weights.tool)
            for call in message["tool_calls"]:
                row.add(
                    [
                        special[tok.CALL_BEGIN],
                        *encode(call["id"]),
                        special[tok.CALL_ARGUMENT],
                        *encode(arguments_text(call["function"]["arguments"])),
                        special[tok.CALL_END],
                    ],
                    weights.tool,
                )
            row.add([special[tok.CALLS_END]], weights.tool)
        row.add([special[tok.IM_END]], 1.0 if train else 0.0)
