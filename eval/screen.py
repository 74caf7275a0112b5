"""Tokens as a person reads them while they arrive: thoughts dimmed, calls highlighted, results of tools indented."""

from __future__ import annotations

from rich.console import Console

from data import tokenizer as tok
from data.render import Message
from data.tokenizer import Tokenizer

THOUGHT, CALL, RESULT, ERROR = "dim", "bold cyan", "green", "red"

MARKS = {tok.THINK: ("thoughts  ", THOUGHT), tok.THINK_END: ("\n", None), tok.CALL_BEGIN: ("call  ", CALL),
         tok.CALL_ARGUMENT: (" ", CALL), tok.CALL_END: ("\n", None)}
"""What stands on the screen for a special token, and the style of the text behind it; other special tokens are not shown."""


class Screen:
    """Prints one conversation."""

    def __init__(self, console: Console, tokenizer: Tokenizer):
        self.console, self.tokenizer = console, tokenizer
        self.style: str | None = None
        self.plain: list[int] = []
        """Plain tokens since the last special one; bytes of a character that is not complete yet wait here."""
        self.shown = 0
        self.at_line_start = True

    def token(self, token: int) -> None:
        """Show one generated token."""
        name = self.tokenizer.names.get(token)
        if name is None:
            self.plain.append(token)
            whole = self.tokenizer.decode(self.plain)
            if not whole.endswith("\ufffd"):
                self._print(whole[self.shown:])
                self.shown = len(whole)
            return
        self._print(self.tokenizer.decode(self.plain)[self.shown:])  # what was no character after all
        self.plain, self.shown = [], 0
        if name in MARKS:
            mark, self.style = MARKS[name]
            self._print(mark if mark != "\n" or not self.at_line_start else "")

    def end_of_reply(self) -> None:
        """Finish the line; the next reply begins in plain style."""
        self._print(self.tokenizer.decode(self.plain)[self.shown:])
        self.plain, self.shown, self.style = [], 0, None
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
            self.console.print(text, end="", style=self.style, markup=False)
            self.at_line_start = text.endswith("\n")
