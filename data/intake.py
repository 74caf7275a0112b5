"""From files to documents on a shelf: texts are encoded, conversations rendered, one after the other as they are read."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from configs.schema import ConfigError, RunConfig
from data.arrays import TokenRow
from data.chat import Account, Talk, chat_rows, refuse
from data.documents import CHAT, IDS, TEXT, Shelf
from data.render import KimiRenderer
from data.sources import Contents, read_source
from data.tokenizer import EOS

TEXT_AT_ONCE = 1 << 22
"""Characters that are encoded together."""


def read_documents(cfg: RunConfig, renderer: KimiRenderer, account: Account) -> Shelf:
    """All documents of data.paths. ConfigError says what cannot be used, and which path holds nothing to train on."""
    intake = _Intake(cfg, renderer, account)
    for source, given in enumerate(cfg.data.paths):
        trained = [intake.take(source, file) for file in read_source(given, cfg.data, renderer.tokenizer, account)]
        if not any(trained):
            raise ConfigError(f"data.paths: {given} holds nothing to train on")
    return intake.shelf


class _Intake:
    """Puts files on the shelf."""

    def __init__(self, cfg: RunConfig, renderer: KimiRenderer, account: Account):
        self.cfg, self.renderer, self.account = cfg, renderer, account
        self.shelf = Shelf(cfg.model.vocab_size)

    def take(self, source: int, file: Contents) -> int:
        """Read a file and hold out its last items; how many are trained on."""
        first, number, waiting = len(self.shelf), 0, 0
        texts: list[tuple[int, str]] = []
        for item in file.items:
            if isinstance(item, str):
                texts.append((number, item))
                waiting += len(item)
            elif isinstance(item, Talk):
                self._add_chat(source, number, item)
            elif isinstance(item, TokenRow):
                self._add_ids(source, number, item)
            else:
                number = self.shelf.add_mapped(source, number, item) - 1
            number += 1
            if waiting >= TEXT_AT_ONCE:
                self._add_texts(source, texts)
                texts, waiting = [], 0
        self._add_texts(source, texts)
        cut = file.cut(number)
        self.shelf.hold_out(first, cut)
        return cut

    def _add_texts(self, source: int, texts: Sequence[tuple[int, str]]) -> None:
        tokenizer = self.renderer.tokenizer
        encoded = tokenizer.encode_many([text for _, text in texts])
        for (number, text), ids in zip(texts, encoded):
            ids = np.concatenate([[tokenizer.bos_id], ids, [tokenizer.special[EOS]]], dtype=np.int32)
            self.shelf.add(source, TEXT, number, ids, None, size=len(text.encode("utf-8", "replace")))

    def _add_ids(self, source: int, number: int, row: TokenRow) -> None:
        """Ids with weights are a conversation, which is never cut; nothing is known of it that could be left out."""
        count, seq_len, too_long = len(row.ids) - 1, self.cfg.train.seq_len, self.cfg.data.too_long
        if row.weights is not None and count > seq_len:
            refuse(
                f"{row.where} has {count} tokens, more than train.seq_len={seq_len}",
                "error" if too_long == "error" else "drop",
                "too_long",
                self.account,
            )
        else:
            self.shelf.add(source, IDS, number, row.ids, row.weights)

    def _add_chat(self, source: int, number: int, talk: Talk) -> None:
        data = self.cfg.data
        for row in chat_rows(talk, self.renderer, data.mode, self.cfg.train.seq_len, data.bad_rows, data.too_long, self.account):
            self.shelf.add(source, CHAT, number, row.ids, row.weights)
