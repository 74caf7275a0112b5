"""Kimi's format back to messages: what a model generated, or a whole rendered row.

`parse_ids` works on token ids, where a special token can not be confused with text that looks like one, and inverts the
renderer exactly. `parse_text` serves text from elsewhere, where names are all there is. Both are lenient where serving
has to be (a thought may end at a call section) and call nothing text that was meant as a call: a call that cannot be
read is a failure with a reason.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from data import tokenizer as tok
from data.render import Message
from data.tokenizer import Tokenizer

Symbol = tuple[bool, str]
"""(is it a special token, its name or the plain text)"""

CALL_ID = re.compile(r"functions\.(?P<name>.+):(?P<index>\d+)")
"""Any name: Kimi's published pattern would lose hyphens."""

SPELLINGS = {tok.CALLS_BEGIN.replace("calls", "call"): tok.CALLS_BEGIN, tok.CALLS_END.replace("calls", "call"): tok.CALLS_END}
"""The singular spelling of the section marks that models sometimes write out."""

DEEPEST = 100
"""Levels of nesting in arguments that are run. How many Python's own functions bear depends on who calls them."""


@dataclass
class Reply:
    """A generated assistant message. `failures` say why calls in it cannot be run; `unreadable` counts these."""

    reasoning: str = ""
    content: str = ""
    calls: list[dict] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    unreadable: int = 0
    finished: bool = False
    """Whether the model ended the message itself."""

    def message(self) -> Message:
        """The canonical message (data/messages.py)."""
        message: Message = {"role": "assistant", "content": self.content}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.calls:
            message["tool_calls"] = self.calls
        return message


def symbols_of_ids(ids: Iterable[int], tokenizer: Tokenizer) -> Iterator[Symbol]:
    plain: list[int] = []
    for i in ids:
        name = tokenizer.names.get(int(i))
        if name is None:
            plain.append(int(i))
            continue
        if plain:
            yield False, tokenizer.decode(plain)
            plain = []
        yield True, name
    if plain:
        yield False, tokenizer.decode(plain)


def symbols_of_text(text: str) -> Iterator[Symbol]:
    names = [*tok.SPECIAL_NAMES, *SPELLINGS]
    for part in re.split("(" + "|".join(map(re.escape, names)) + ")", text):
        if part:
            yield part in names, SPELLINGS.get(part, part)


class _Cursor:
    """Reads a list of symbols from left to right."""

    def __init__(self, symbols: Iterable[Symbol]):
        self.symbols, self.at = list(symbols), 0

    def at_special(self, *names: str) -> bool:
        return self.at < len(self.symbols) and self.symbols[self.at] in [(True, name) for name in names]

    def take(self, *names: str) -> bool:
        """Step over one of these special tokens if it comes next."""
        found = self.at_special(*names)
        self.at += found
        return found

    def text(self, *ends: str) -> str:
        """Everything up to one of these special tokens; other special tokens appear by name."""
        out = []
        while self.at < len(self.symbols) and not self.at_special(*ends):
            out.append(self.symbols[self.at][1])
            self.at += 1
        return "".join(out)

    @property
    def done(self) -> bool:
        return self.at >= len(self.symbols)


def parse_ids(ids: Sequence[int], tokenizer: Tokenizer) -> Reply:
    """The reply in generated ids (everything after the assistant header)."""
    return _reply(_Cursor(symbols_of_ids(ids, tokenizer)))


def parse_text(text: str) -> Reply:
    """The reply in generated text with the special tokens written out."""
    return _reply(_Cursor(symbols_of_text(text)))


def _reply(cursor: _Cursor) -> Reply:
    reply = Reply()
    ends = (tok.CALLS_BEGIN, tok.IM_END, tok.EOS)
    if cursor.take(tok.THINK):
        reply.reasoning = cursor.text(tok.THINK_END, *ends)
        cursor.take(tok.THINK_END)
    reply.content = cursor.text(*ends)
    while cursor.take(tok.CALLS_BEGIN):
        calls, failures = len(reply.calls) + reply.unreadable, len(reply.failures)
        _section(cursor, reply)
        if len(reply.failures) > failures and len(reply.calls) + reply.unreadable == calls:
            reply.unreadable += 1  # whatever it was, a call was meant
        reply.content += cursor.text(*ends)
    reply.finished = cursor.take(tok.IM_END, tok.EOS)
    return reply


def _section(cursor: _Cursor, reply: Reply) -> None:
    """The calls between the two section marks; an early end of the text makes the call that is cut off a failure."""
    ends = (tok.CALL_BEGIN, tok.CALLS_END, tok.IM_END, tok.EOS)
    while not cursor.take(tok.CALLS_END):
        if cursor.done or cursor.at_special(tok.IM_END, tok.EOS):
            reply.failures.append("the section of calls is not closed")
            return
        if not cursor.take(tok.CALL_BEGIN):
            stray = cursor.text(*ends)
            if stray.strip():
                reply.failures.append(f"text between calls: {stray.strip()[:60]}")
            continue
        call_id = cursor.text(tok.CALL_ARGUMENT, tok.CALL_END, *ends)
        has_arguments = cursor.take(tok.CALL_ARGUMENT)
        arguments = cursor.text(tok.CALL_END, *ends)
        closed = cursor.take(tok.CALL_END)
        _call(reply, call_id, arguments, has_arguments and closed)


def _call(reply: Reply, call_id: str, arguments: str, whole: bool) -> None:
    match = CALL_ID.fullmatch(call_id.strip())
    if not whole:
        wrong = f"call {call_id[:60]!r} is cut off"
    elif not match:
        wrong = f"call id {call_id[:60]!r} is not functions.NAME:INDEX"
    elif reason := json_object_error(arguments):
        wrong = f"arguments of {match['name']} {reason}"
    else:
        function = {"name": match["name"], "arguments": arguments}
        reply.calls.append({"id": call_id.strip(), "type": "function", "function": function})
        return
    reply.failures.append(wrong)
    reply.unreadable += 1


def json_object_error(text: str) -> str | None:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        return f"are not JSON ({error.msg}): {text[:60]}"
    except (ValueError, RecursionError):
        return f"hold a number too long or brackets too deep to read: {text[:60]}"
    if not isinstance(value, dict):
        return f"are not a JSON object: {text[:60]}"
    return f"are nested more than {DEEPEST} deep: {text[:60]}" if _deeper(value, DEEPEST) else None


def _deeper(value: Any, levels: int) -> bool:
    """Whether lists and objects stand in each other more than `levels` times."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return inner is not None and (levels == 0 or any(_deeper(each, levels - 1) for each in inner))


def parse_conversation(ids: Sequence[int], tokenizer: Tokenizer) -> tuple[list[Message], list[dict]]:
    """(messages, tools) of a whole rendered row, the inverse of the renderer. ValueError where it is no such row.

    A system frame is read as a tool's result when its heading names a call that was made before it.
    """
    cursor = _Cursor(symbols_of_ids(ids, tokenizer))
    messages: list[Message] = []
    tools: list[dict] = []
    waiting: set[str] = set()
    roles = {tok.IM_USER: "user", tok.IM_ASSISTANT: "assistant", tok.IM_SYSTEM: "system"}
    while not cursor.done:
        token = next((name for name in roles if cursor.take(name)), None)
        if token is None:
            raise ValueError(f"a message begins with {cursor.symbols[cursor.at][1][:40]!r} and not with a role token")
        name = cursor.text(tok.IM_MIDDLE)
        cursor.take(tok.IM_MIDDLE)
        role = roles[token]
        if role == "assistant":
            message = _reply(cursor).message()
            waiting |= {call["id"] for call in message.get("tool_calls", ())}
        else:
            message = {"role": role, "content": cursor.text(tok.IM_END)}
            if not cursor.take(tok.IM_END):
                raise ValueError(f"the {role} message at the end is not closed")
            heading, _, rest = message["content"].partition("\n")
            call_id = heading.removeprefix("## Return of ")
            if role == "system" and name == "tool_declare" and not messages and not tools:
                tools = json.loads(message["content"])
                continue
            if role == "system" and heading != call_id and call_id in waiting:
                waiting.discard(call_id)
                message = {"role": "tool", "content": rest, "tool_call_id": call_id}
        if name != message["role"]:
            message["name"] = name
        messages.append(message)
    return messages, tools
