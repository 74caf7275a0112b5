"""Conversations to training rows that fit, with an account of everything that was left out."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from data.messages import Conversation, Message, RowError
from data.render import KimiRenderer, Mode, Rendered


class Talk(NamedTuple):
    """A conversation and the file and line it stands in."""

    where: str
    conversation: Conversation


@dataclass
class Account:
    """What became of the conversations, and what was left out."""

    conversations: int = 0
    rows: int = 0
    shortened: int = 0
    untrained: int = 0
    """Answers whose row trains nothing, because the conversation says so; it has other answers."""
    trained_tokens: int = 0
    tokens: int = 0
    """Of the rows."""
    rendered: int = 0
    rendered_once: int = 0
    """Tokens rendered, and tokens if only the longest row of each conversation were: the cost of a row per segment."""
    files: int = 0
    skipped_files: int = 0
    """What is passed over in folders: files that cannot be read, links to folders, run directories."""
    rejected: list[str] = field(default_factory=list)
    """WHERE: why, for every conversation, row or file that was left out."""
    remarks: list[str] = field(default_factory=list)

    def summary(self) -> dict[str, object]:
        """The counts, for people."""
        if not self.conversations:
            return {"rejected": len(self.rejected)} if self.rejected else {}
        return {
            "conversations": self.conversations,
            "chat_rows": self.rows,
            "shortened": self.shortened,
            "untrained_answers": self.untrained,
            "rejected": len(self.rejected),
            "trained_share": self.trained_tokens / max(1, self.tokens),
            "duplication": self.rendered / max(1, self.rendered_once),
        }

    def reject(self, reason: str) -> None:
        self.rejected.append(printable(reason))

    def remark(self, remark: str) -> None:
        self.remarks.append(printable(remark))


def printable(text: str) -> str:
    """Lone surrogates, which rows and names of files can hold and no file or terminal takes, written as escapes."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def without_oldest_exchange(messages: Sequence[Message]) -> list[Message] | None:
    """Leave out the first assistant message that calls tools, with its results; None if only the end is left.

    The assistant message behind the gap is not trained: what it went on from is gone, so it would teach to invent.
    """
    for start, message in enumerate(messages):
        if message.get("tool_calls"):
            end = start + 1
            while end < len(messages) and messages[end]["role"] == "tool":
                end += 1
            rest = list(messages[end:])
            if rest and rest[0]["role"] == "assistant":
                rest[0] = rest[0] | {"train": False}
            return [*messages[:start], *rest] if rest else None
    return None


def numbered(messages: Sequence[Message]) -> list[Message]:
    """The messages with their calls counted from 0 in the order they stand, results following. What a server does with a
    conversation it is given: it cannot know of calls that were left out before."""
    ids: dict[str, str] = {}
    out = []
    for message in messages:
        if message.get("tool_calls"):
            calls = []
            for call in message["tool_calls"]:
                ids[call["id"]] = f"functions.{call['function']['name']}:{len(ids)}"
                calls.append(call | {"id": ids[call["id"]]})
            message = message | {"tool_calls": calls}
        elif message["role"] == "tool":
            message = message | {"tool_call_id": ids[message["tool_call_id"]]}
        out.append(message)
    return out


def shorter_versions(messages: Sequence[Message]) -> list[list[Message]]:
    """The conversation without its oldest tool exchange, without the oldest two, and so on."""
    versions = []
    while (messages := without_oldest_exchange(messages)) is not None:
        versions.append(messages)
    return versions


def shortened(
    messages: Sequence[Message], tools: Sequence[dict], renderer: KimiRenderer, mode: Mode, seq_len: int
) -> Rendered | None:
    """The row that ends with these messages, as few of the oldest tool exchanges left out as make it fit, or None."""

    def row(version: Sequence[Message]) -> Rendered | None:
        rows = renderer.rows(numbered(version), tools, "preserved" if mode == "preserved" else "last_segment")
        return rows[0] if rows else None

    def short_enough(version: Sequence[Message]) -> bool:
        return (made := row(version)) is None or fits(made, seq_len)

    versions = shorter_versions(messages)
    first = bisect_left(versions, True, key=short_enough)
    return row(versions[first]) if first < len(versions) else None


def fits(row: Rendered, seq_len: int) -> bool:
    return len(row.ids) - 1 <= seq_len


def chat_rows(
    given: Talk, renderer: KimiRenderer, mode: Mode, seq_len: int, bad_rows: str, too_long: str, account: Account
) -> Iterator[Rendered]:
    """Training rows of a conversation; `account` is filled in. RowError where the settings say error."""
    where, talk = given
    account.conversations += 1
    for remark in talk.remarks:
        account.remark(f"{where}: {remark}")
    whole = renderer.rows(talk.messages, talk.tools, mode)
    if not whole:
        refuse(f"{where}: no token of it is trained", bad_rows, "bad_rows", account)
        return
    account.untrained += renderer.segments(talk.messages, mode) - len(whole)
    account.rendered += sum(len(row.ids) for row in whole)
    account.rendered_once += max(len(row.ids) for row in whole)
    for number, row in enumerate(whole):
        if not fits(row, seq_len):
            length = f"{where}: row {number + 1} has {len(row.ids) - 1} tokens, more than train.seq_len={seq_len}"
            if too_long == "shorten":
                row = shortened(talk.messages[: row.end], talk.tools, renderer, mode, seq_len)
                account.shortened += row is not None
            else:
                row = None
            if row is None:
                refuse(length, "error" if too_long == "error" else "drop", "too_long", account)
                continue
        account.rows += 1
        account.tokens += len(row.ids)
        account.trained_tokens += row.trained
        yield row


HINTS = {
    "bad_rows": "correct it, or leave such rows out with data.bad_rows=drop",
    "too_long": "raise train.seq_len, or set data.too_long to drop or shorten",
}


def refuse(reason: str, policy: str, setting: str, account: Account) -> None:
    """Stop, or write it down and go on."""
    if policy == "error":
        raise RowError(printable(f"{reason}; {HINTS[setting]}"))
    account.reject(reason)
