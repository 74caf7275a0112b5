"""chat_template.jinja, which tells engines what the renderer writes (data/render.py). How a run lays its conversations out
stands in the first lines of the file it exports, so that whoever has the weights asks them as they were trained."""

from __future__ import annotations

import json
import re
from pathlib import Path

from configs.schema import ConfigError

FILE = "chat_template.jinja"
SYSTEM, PRESERVED = "{{%- set default_system = {} -%}}\n", "{%- set keep_thoughts = true -%}\n"
HEAD = re.compile(
    r'(?:\{%- set default_system = (?P<system>".*") -%\}\n)?'
    r"(?P<preserved>\{%- set keep_thoughts = true -%\}\n)?"
)


def chat_template(system: str | None, mode: str) -> str:
    """The template for data.system and data.mode of a run."""
    head = "" if system is None else SYSTEM.format(json.dumps(system, ensure_ascii=False))
    return head + (PRESERVED if mode == "preserved" else "") + (Path(__file__).parent / FILE).read_text()


def template_settings(directory: Path) -> dict[str, str]:
    """`system` and `mode` of DataConfig, as far as the template of an exported directory sets them."""
    path = directory / FILE
    try:
        head = HEAD.match(path.read_text(encoding="utf-8") if path.is_file() else "")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 ({error}); restore it, or remove it") from None
    try:
        system = {"system": json.loads(head["system"])} if head["system"] else {}
    except ValueError as error:
        raise ConfigError(f"{path}: default_system in the first line is no JSON text ({error}); correct it") from None
    return system | ({"mode": "preserved"} if head["preserved"] else {})
