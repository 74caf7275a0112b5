"""Tokens as a person reads them while they arrive: thoughts dimmed, calls highlighted, results of tools indented."""

from __future__ import annotations

from rich.console import Console
from rich.segment import Segment, Segments

from data import tokenizer as tok
from data.preview import visible
from data.render import Message
from data.tokenizer import Tokenizer

THOUGHT, CALL, RESULT, ERROR = "dim", "bold cyan", "green", "red"

MARKS = {
    tok.THINK: ("thoughts  ", THOUGHT),
    tok.THINK_END: ("\n", None),
    tok.CALL_BEGIN: ("call  ", CALL),
    tok.CALL_ARGUMENT: (" ", CALL),
    tok.CALL_END: ("\n", None),
}
"""What stands on the screen for a special token, and the style of the text behind it; other special tokens are not shown."""

CROWDED, WINDOW, UNFINISHED = 64, 16, 3
"""So many tokens without a sound end are no character: all but the last few broken characters are shown, and so many tokens
stay, more than a character has bytes."""


def say(console: Console, text: str, style: str | None = None) -> None:
    """Print a text that is not ours exactly, control characters as escapes where a terminal would obey them. (As a string it
    would lose some of them to rich, which also widens tabs and puts emojis in.)"""
    if console.is_terminal:
        text = visible(text)
    console.print(Segments([Segment(text)]), style=style, soft_wrap=True)


class Screen:
    """Prints one conversation."""

    def __init__(self, console: Console, tokenizer: Tokenizer):
        self.console, self.tokenizer = console, tokenizer
        self.style: str | None = None
        self.plain: list[int] = []
        """The latest plain tokens since the last special one; bytes of a character that is not complete yet wait here."""
        self.shown = 0
        """Characters of their text that are on the screen."""
        self.sound = 0
        """Tokens of them up to the last one behind which no character was broken."""
        self.at_line_start = True

    def token(self, token: int) -> None:
        """Show one generated token."""
        name = self.tokenizer.names.get(token)
        if name is None:
            self._plain(token)
            return
        self._flush()
        if name in MARKS:
            mark, self.style = MARKS[name]
            self._print(mark if mark != "\n" or not self.at_line_start else "")

    def _plain(self, token: int) -> None:
        """Show what is sure to stand: all but broken characters at the end, which the next tokens may complete. The tokens
        since the last sound end but one are decoded together, because what a token says may depend on the one before."""
        self.plain.append(token)
        text, crowded = self.tokenizer.decode(self.plain), len(self.plain) > CROWDED
        broken = len(text) - len(text.rstrip("\ufffd"))
        end = max(self.shown, len(text) - (min(broken, UNFINISHED) if crowded else broken))
        self._print(text[self.shown : end])
        self.shown = end
        if crowded or not broken:
            self.plain = self.plain[-WINDOW if crowded else self.sound :]
            self.shown -= len(text) - len(self.tokenizer.decode(self.plain))
            self.sound = len(self.plain)

    def _flush(self) -> None:
        """Show what was no character after all."""
        self._print(self.tokenizer.decode(self.plain)[self.shown :])
        self.plain, self.shown, self.sound = [], 0, 0

    def end_of_reply(self) -> None:
        """Finish the line; the next reply begins in plain style."""
        self._flush()
        self.style = None
        if not self.at_line_start:
            self._print("\n")

    def message(self, message: Message) -> None:
        """Show what a tool or the user said."""
        if message["role"] == "assistant":
            return
        self.style = (ERROR if message["content"].startswith("error") else RESULT) if message["role"] == "tool" else "bold"
        self._print(f"{'result' if message['role'] == 'tool' else message['role']}  {message['content']}\n")
        self.style = None

    def _print(self, text: str) -> None:
        if text:
            say(self.console, text, self.style)
            self.at_line_start = text.endswith("\n")
