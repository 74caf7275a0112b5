"""Chat rows as users have them (OpenAI, ShareGPT) to one canonical form, or a sentence saying what is wrong with a row.

Canonical messages: `role` (system, user, assistant, tool), `content` (str), for assistants `reasoning_content` (str,
when they thought) and `tool_calls` (with string arguments), for tool results `tool_call_id` and `name`, and
`train: False` where the row switches training off. Calls are renumbered `functions.NAME:INDEX` over the whole
conversation, as Kimi's serving does; results follow their call. Arguments are written anew, as serving engines do, which
hand objects to the template whatever text a client sent.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from configs.schema import ConfigError
from data.render import Message, arguments_text, text_of
from data.tokenizer import THINK, THINK_END

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "human": "user",
    "gpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function": "tool",
    "tool_call": "assistant",
    "tool_response": "tool",
}
"""OpenAI's, ShareGPT's and ms-swift's names for the four roles."""
CALL_ROLES = ("function_call", "tool_call")
"""Messages whose whole text is a call. Several in a row, or one behind a text, are one turn of the assistant."""
THOUGHT_FIELDS = ("reasoning_content", "reasoning", "thinking")
SWITCHES = ("train", "weight", "loss_mask")
"""Fields whose false or zero value keeps a message out of the loss."""
ARGUMENT_FIELDS = ("arguments", "parameters", "args")


class RowError(ConfigError):
    """One row of the data that cannot be used, and why."""


@dataclass
class Conversation:
    """Canonical messages, the declared tools, and remarks on what is allowed but probably a mistake."""

    messages: list[Message]
    tools: list[dict] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


def conversation(row: dict[str, Any]) -> Conversation:
    """Canonical form of a row with `messages` (OpenAI) or `conversations` (ShareGPT). RowError says what is wrong."""
    given = row["conversations"] if row.get("messages") is None and "conversations" in row else row.get("messages")
    if not isinstance(given, list) or not given:
        raise RowError("has no messages")
    reader = _Reader()
    if row.get("system") and not _is_system(given[0]):
        reader.add({"role": "system", "content": row["system"]})
    for reader.number, message in enumerate(given, start=1):
        try:
            reader.add(message)
        except RowError as error:
            raise RowError(f"message {reader.number}: {error}") from None
    if isinstance(row.get("system"), str) and row["system"] not in ("", reader.messages[0]["content"]):
        reader.remarks.append("has a system text beside its messages, which begin with another one: that one is trained")
    if not any(message["role"] == "assistant" for message in reader.messages):
        raise RowError("has no assistant message to learn from")
    if reader.waiting and reader.messages[-1]["role"] == "tool":
        raise RowError(f"ends before the result of call {next(iter(reader.waiting))!r}")
    tools = _tools(row.get("tools") or row.get("functions"))
    return Conversation(reader.messages, tools, [*reader.remarks, *_declared(reader.called, tools)])


def _declared(called: set[str], tools: list[dict]) -> list[str]:
    if called and not tools:
        return ["calls tools but declares none: a model trained so may stop calling where they are declared"]
    unknown = called - {tool["function"]["name"] for tool in tools}
    return [f"calls {', '.join(sorted(unknown))} without declaring it"] if unknown else []


def _is_system(message: Any) -> bool:
    return isinstance(message, dict) and _role(message) == "system"


def _role(message: Message) -> str | None:
    given = message.get("role", message.get("from"))
    return ROLES.get(given) if isinstance(given, str) else None


def _name(body: Message, field: str) -> str | None:
    """A field that holds a name or an id, if the message has it."""
    given = body.get(field)
    if given is not None and not isinstance(given, str):
        raise RowError(f"{field} is {type(given).__name__}, not text")
    return given or None


def _tools(given: str | list | None) -> list[dict]:
    if isinstance(given, str):
        try:
            given = _read_json(given) if given.strip() else []
        except _NoJSONError as error:
            raise RowError(f"tools are not JSON: {error}") from None
    if given is None:
        return []
    if not isinstance(given, list) or not all(isinstance(tool, dict) for tool in given):
        raise RowError("tools must be a list of objects")
    tools = [tool if "function" in tool else {"type": "function", "function": tool} for tool in given]
    for number, tool in enumerate(tools, start=1):
        if (
            not isinstance(tool["function"], dict)
            or not isinstance(tool["function"].get("name"), str)
            or not tool["function"]["name"].strip()
        ):
            raise RowError(f"tool {number} has no name")
    _json_text(tools, "tools hold")
    return tools


def _json_text(value: Any, what: str) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except ValueError:
        raise RowError(f"{what} a number that JSON has no word for (NaN or infinity)") from None


class _Reader:
    """Walks a conversation and keeps track of which calls still wait for their result."""

    def __init__(self):
        self.messages: list[Message] = []
        self.remarks: list[str] = []
        self.called: set[str] = set()
        self.number = 0
        """Of the message being read, from 1."""
        self.calls = 0
        self.seen_ids: set[str] = set()
        self.waiting: dict[str, tuple[str, str]] = {}
        """id in the row -> (our id, function name)"""

    def add(self, message: Any) -> None:
        if not isinstance(message, dict):
            raise RowError(f"is {type(message).__name__}, not an object")
        given, role = message.get("role", message.get("from")), _role(message)
        if role is None:
            raise RowError(f"unknown role {given!r}; known are {', '.join(ROLES)}")
        if role != "assistant" and message.get("tool_calls"):
            raise RowError(f"has tool_calls, but only an assistant calls tools, not a {given}")
        joins = given in CALL_ROLES and bool(self.messages) and self.messages[-1]["role"] == "assistant"
        if role != "tool" and self.waiting and not joins:
            raise RowError(f"comes before the result of call {next(iter(self.waiting))!r}")
        if role == "tool" and (several := _tagged(message, RESPONSE_TAG)):
            if RESPONSE_TAG.sub("", message["value"]).strip():
                raise RowError("has text outside of <tool_response>, which belongs to no call")
            for response in several:
                self._result(message, response)
            return
        body = self._call_body(message) if given in CALL_ROLES else _calls_from_tags(message) if role == "assistant" else message
        content = _as_text(body) if role == "tool" else self._content(body)
        if role == "assistant":
            self._assistant(body, content, joins)
        elif role == "tool":
            self._result(body, content)
        else:
            self._append(role, body, content)

    def _content(self, body: Message) -> str:
        content = _given(body)
        if isinstance(content, list):
            for part in content:
                kind = part.get("type") if isinstance(part, dict) else type(part).__name__
                if kind != "text" or not isinstance(part.get("text"), str):
                    raise RowError(f"content holds a part of type {kind}, which is not text")
        elif content is not None and not isinstance(content, str):
            raise RowError(f"content is {type(content).__name__}, not text")
        return text_of(content)

    def _append(self, role: str, body: Message, content: str, **more: Any) -> None:
        message = {"role": role, "content": content, **more}
        if role != "tool" and _name(body, "name"):
            message["name"] = body["name"]
        if _switched_off(body):
            message["train"] = False
        self.messages.append(message)

    def _assistant(self, body: Message, content: str, joins: bool) -> None:
        thoughts, content = _thoughts(body, content)
        more: dict[str, Any] = {"reasoning_content": thoughts} if thoughts else {}
        if body.get("tool_calls") and body.get("function_call"):
            raise RowError("has tool_calls and a function_call: which of them was made?")
        given = body.get("tool_calls") or _legacy_call(body)
        if not isinstance(given, list):
            raise RowError(f"tool_calls is {type(given).__name__}, not a list")
        calls = [self._call(call) for call in given]
        if joins:
            if thoughts:
                raise RowError(
                    "has thoughts, but goes on with the turn of the message before it; give that one all thoughts of the turn"
                )
            self.messages[-1].setdefault("tool_calls", []).extend(calls)
            if _switched_off(body):
                self.messages[-1]["train"] = False
            return
        if calls:
            more["tool_calls"] = calls
        if not (calls or thoughts or content):
            self.remarks.append(f"message {self.number} says nothing: an empty answer is trained")
        self._append("assistant", body, content, **more)

    def _call(self, call: Any) -> dict:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            raise RowError("a tool call has no function name")
        if function["name"].split() != [function["name"]]:
            raise RowError(f"the name {function['name']!r} of a called function holds white space")
        given = next((function[field] for field in ARGUMENT_FIELDS if function.get(field) not in (None, "")), {})
        try:
            parsed = _read_json(given) if isinstance(given, str) else given
            text = arguments_text(parsed)
        except RowError:
            raise
        except ValueError:
            raise RowError(f"arguments of {function['name']} are not JSON: {str(given)[:60]}") from None
        if not isinstance(parsed, dict):
            raise RowError(f"arguments of {function['name']} are not a JSON object: {str(given)[:60]}")
        ours = f"functions.{function['name']}:{self.calls}"
        theirs = _name(call, "id") or ours
        if theirs in self.seen_ids:
            raise RowError(f"call id {theirs!r} is used twice")
        self.seen_ids.add(theirs)
        self.waiting[theirs] = ours, function["name"]
        self.called.add(function["name"])
        self.calls += 1
        return {"id": ours, "type": "function", "function": {"name": function["name"], "arguments": text}}

    def _call_body(self, message: Message) -> Message:
        """A message that is a call: its value is one, or a list of them, as JSON."""
        value = _given(message)
        try:
            value = value if isinstance(value, (dict, list)) else _read_json(value)
        except (_NoJSONError, TypeError):
            raise RowError(f"{message.get('role', message.get('from'))} is not JSON") from None
        calls = value if isinstance(value, list) else [value]
        return message | {"value": "", "content": "", "tool_calls": [{"function": call} for call in calls]}

    def _result(self, body: Message, content: str) -> None:
        ours, name = self.waiting.pop(self._awaited(body))
        self._append("tool", body, content, tool_call_id=ours, name=_name(body, "name") or name)

    def _awaited(self, body: Message) -> str:
        """The waiting call that a result is of, by its id in the row; where the result has none, the first of the function
        that it names, or the first of all."""
        theirs, function = _name(body, "tool_call_id"), _name(body, "name")
        if theirs is None:
            theirs = next((call for call, (_, name) in self.waiting.items() if function in (None, name)), None)
        if theirs in self.waiting:
            return theirs
        if theirs in self.seen_ids:
            raise RowError(f"is a second result of call {theirs!r}")
        if theirs or self.waiting:
            raise RowError(f"is the result of {theirs or function!r}, which no call before it waits for")
        raise RowError("is a tool result without a call before it (calls are read from fields, not from text)")


def _switched_off(body: Message) -> bool:
    for switch in SWITCHES:
        if body.get(switch) not in (None, 0, 1):
            raise RowError(f"{switch} is {body[switch]!r}; a message is trained or not: 0 or 1")
    return any(body.get(switch) == 0 for switch in SWITCHES)


def _given(body: Message) -> Any:
    """Content under OpenAI's or ShareGPT's name; a refusal is content too."""
    content = body.get("content", body.get("value"))
    return body["refusal"] if content is None and isinstance(body.get("refusal"), str) else content


def _as_text(body: Message) -> str:
    """Content of a tool result: text, text parts, or any other JSON value written out."""
    content = _given(body)
    parts = isinstance(content, list) and all(
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str) for part in content
    )
    if content is None or parts or isinstance(content, str):
        return text_of(content)
    return _json_text(content, "holds")


CALL_TAG = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)
HALF_CALL = re.compile(r"<tool_call>\s*\{|\}\s*</tool_call>")
RESPONSE_TAG = re.compile(r"<tool_response>\s*(.*?)\s*</tool_response>", re.DOTALL)
"""How ShareGPT rows of Hermes' kind write calls and results inside the text of a turn."""


def _tagged(message: Message, tag: re.Pattern) -> list[str]:
    """What stands in the tags of a ShareGPT turn. Other formats have fields for it: there, tags are text."""
    value = message.get("value") if "from" in message else None
    return tag.findall(value) if isinstance(value, str) else []


def _calls_from_tags(message: Message) -> Message:
    """A ShareGPT turn with its tagged calls as tool_calls. What a thought says of calls is thought, not called."""
    value = message.get("value") if "from" in message else None
    if not isinstance(value, str):
        return message
    thought, closed, said = value.partition(THINK_END) if value.lstrip().startswith(THINK) else ("", "", value)
    try:
        calls = [{"function": _read_json(text)} for text in CALL_TAG.findall(said)]
    except _NoJSONError:
        raise RowError("a <tool_call> does not hold JSON") from None
    rest = CALL_TAG.sub("", said)
    if HALF_CALL.search(rest):
        raise RowError("has a <tool_call> without its other end: the call would be trained as the answer")
    if calls and message.get("tool_calls"):
        raise RowError("has calls in tags and in tool_calls: which of them were made?")
    return message | {"value": thought + closed + rest.strip(), "tool_calls": calls} if calls else message


def _read_json(text: str) -> Any:
    """The value. _NoJSONError for what is no JSON, NaN included, and for numbers too long and brackets too deep to read; RowError
    for an object that has a key twice."""
    try:
        return json.loads(text, parse_constant=_no_constant, object_pairs_hook=_each_once)
    except RowError:
        raise
    except ValueError as error:
        raise _NoJSONError(str(error)) from None
    except RecursionError:
        raise _NoJSONError("brackets are nested too deeply") from None


class _NoJSONError(ValueError):
    pass


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise RowError(f"an object of JSON has the key {twice!r} twice: which of them is meant?")
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _legacy_call(body: Message) -> list[dict]:
    """OpenAI's older form of a single call."""
    return [{"function": body["function_call"]}] if body.get("function_call") else []


def _thoughts(body: Message, content: str) -> tuple[str, str]:
    """(thoughts, content) of an assistant message; thoughts may also stand in tags at the start of the content, there alone
    or a second time."""
    fields = [body[name] for name in THOUGHT_FIELDS if body.get(name)]
    if wrong := [field for field in fields if not isinstance(field, str)]:
        raise RowError(f"thoughts are {type(wrong[0]).__name__}, not text")
    fields = [field for field in fields if field.strip()]
    if len({field.strip() for field in fields}) > 1:
        raise RowError(f"has different thoughts in {' and '.join(name for name in THOUGHT_FIELDS if body.get(name))}")
    given = fields[0] if fields else ""
    if not content.lstrip().startswith(THINK):
        before, closed, _ = content.partition(THINK_END)
        if closed and THINK not in before:
            raise RowError(f"closes {THINK_END} and does not open it: its thoughts would be trained as the answer")
        return given, content
    thoughts, closed, rest = content.lstrip()[len(THINK) :].partition(THINK_END)
    if not closed:
        raise RowError(f"opens {THINK} and does not close it")
    if given and thoughts.strip() not in ("", given.strip()):
        raise RowError(f"has thoughts in a field and other ones between {THINK} and {THINK_END}")
    return given or thoughts.strip("\n"), rest.lstrip("\n")
