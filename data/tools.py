"""Tools a model may call: Python functions with annotated arguments, from which their declarations are derived."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import json
import operator
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

from configs.schema import ConfigError
from data.render import Message

JSON_TYPES: dict[Any, str] = {str: "string", int: "integer", float: "number", bool: "boolean", list: "array", dict: "object"}


@dataclass(frozen=True)
class Tool:
    """A callable and what the model is told about it. `run` takes the parsed arguments; its result is shown as text."""

    name: str
    description: str
    parameters: dict[str, Any]
    run: Callable[..., object]

    @property
    def declaration(self) -> dict[str, Any]:
        """OpenAI's tool declaration."""
        function = {"name": self.name, "parameters": self.parameters}
        if self.description:
            function["description"] = self.description
        return {"type": "function", "function": function}


def tool(function: Callable[..., object], name: str | None = None) -> Tool:
    """A Tool from a Python function: name, first docstring line, argument names and types.

    ConfigError when an argument has no annotation, or one that JSON has no word for, or Python does not know them.
    """
    properties, required = {}, []
    name = name or getattr(function, "__name__", type(function).__name__)
    try:
        signature = inspect.signature(function, eval_str=True)
    except Exception as error:  # noqa: BLE001  annotations are the user's code, and functions of C may have none
        raise ConfigError(f"tool {name}: {error}; give an annotated Python function") from None
    for argument in signature.parameters.values():
        if argument.kind not in (argument.POSITIONAL_OR_KEYWORD, argument.KEYWORD_ONLY):
            raise ConfigError(f"tool {name}: {argument} cannot be given by name, and a model gives every argument so")
        kind = next((word for known, word in JSON_TYPES.items() if known is argument.annotation), None)
        if kind is None:
            raise ConfigError(f"tool {name}: annotate {argument.name} with one of {', '.join(t.__name__ for t in JSON_TYPES)}")
        properties[argument.name] = {"type": kind}
        if argument.default is inspect.Parameter.empty:
            required.append(argument.name)
    schema = {"type": "object", "properties": properties, "required": required}
    description = (inspect.getdoc(function) or "").partition("\n")[0]
    return Tool(name, description, schema, function)


def tools_from_file(path: str | Path) -> list[Tool]:
    """Every public function that a Python file defines, as a tool. ConfigError if it has none or fails to load."""
    spec = importlib.util.spec_from_file_location("tools_of_the_user", path)
    if spec is None or not Path(path).is_file():
        raise ConfigError(f"tools file {path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # noqa: BLE001  the file is the user's code, and may be a program
        raise ConfigError(f"tools file {path}: {_reason(error)}") from None
    found = [
        tool(value)
        for name, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == spec.name and not name.startswith("_")
    ]
    if not found:
        raise ConfigError(f"tools file {path} defines no public function")
    return found


def tool_from_module(module: str, function: str) -> Tool:
    """`function` of an importable module (the working directory is searched too)."""
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        found = getattr(importlib.import_module(module), function)
    except (Exception, SystemExit) as error:  # noqa: BLE001  the module is the user's code, and may be a program
        raise ConfigError(f"--tools {module}:{function}: {_reason(error)}") from None
    if not callable(found):
        raise ConfigError(f"--tools {module}:{function} is {type(found).__name__}, not a function")
    return tool(found)


def _reason(error: BaseException) -> str:
    return "it ends the program (sys.exit)" if isinstance(error, SystemExit) else str(error)


def tools_by_name(names: Sequence[str]) -> list[Tool]:
    """Tools as the command line names them: `calculator`, `key_value`, MODULE:FUNCTION, or a file FILE.py, whose public
    functions all become tools. ConfigError for anything else, and for two tools of one name."""
    made: list[Tool] = []
    for name in names:
        module, colon, function = name.partition(":")
        if name in BUILT_IN:
            made += BUILT_IN[name]()
        elif name.endswith(".py"):
            made += tools_from_file(name)
        elif colon:
            made.append(tool_from_module(module, function))
        else:
            raise ConfigError(f"--tools {name}: name {', '.join(BUILT_IN)}, MODULE:FUNCTION or FILE.py")
    twice = {t.name for t in made if sum(other.name == t.name for other in made) > 1}
    if twice:
        raise ConfigError(f"--tools: there are two tools named {sorted(twice)[0]}")
    return made


def arguments_error(schema: dict[str, Any], arguments: dict[str, Any]) -> str | None:
    """Why arguments do not fit a tool's parameters, or None. Knows properties, required and simple types."""
    properties = schema.get("properties", {})
    for name in schema.get("required", ()):
        if name not in arguments:
            return f"{name} is missing"
    for name, value in arguments.items():
        if name not in properties:
            return f"{name} is not an argument"
        wanted = properties[name].get("type")
        kind = next((word for python, word in JSON_TYPES.items() if type(value) is python), "null")
        if wanted and kind != wanted and not (wanted == "number" and kind == "integer"):
            return f"{name} is {kind}, not {wanted}"
    return None


@dataclass
class CallCounts:
    """How the calls that could be read went: fitting the declared tool, run without an error."""

    made: int = 0
    unfit: int = 0
    failed: int = 0

    @property
    def valid_share(self) -> float:
        """Share of calls that name a declared tool with fitting arguments; 1 when none was made."""
        return 1.0 if self.made == 0 else (self.made - self.unfit) / self.made


class Toolbox:
    """Runs calls by name. Whatever goes wrong becomes the text of the result, as a model would see it."""

    def __init__(self, tools: Sequence[Tool]):
        self.tools = {t.name: t for t in tools}
        self.counts = CallCounts()

    @property
    def declarations(self) -> list[dict[str, Any]]:
        return [t.declaration for t in self.tools.values()]

    def results(self, message: Message) -> list[Message]:
        """One tool message for each call of an assistant message, in order. Half a surrogate pair, which arguments in JSON
        can spell, becomes a question mark as in tokenizers."""
        return [
            {
                "role": "tool",
                "content": self._run(call["function"]).encode("utf-8", "replace").decode(),
                "tool_call_id": call["id"],
                "name": call["function"]["name"],
            }
            for call in message.get("tool_calls", ())
        ]

    def _run(self, function: dict[str, str]) -> str:
        self.counts.made += 1
        called = self.tools.get(function["name"])
        if called is None:
            self.counts.unfit += 1
            return f"error: no tool {function['name']}; there are {', '.join(self.tools)}"
        arguments = json.loads(function["arguments"])
        reason = arguments_error(called.parameters, arguments)
        if reason:
            self.counts.unfit += 1
            return f"error: {reason}"
        try:
            return str(called.run(**arguments))
        except (Exception, SystemExit) as error:  # noqa: BLE001  a tool is the user's code: the model is told, the loop goes on
            self.counts.failed += 1
            return f"error: {_reason(error)}"


def call(number: int, name: str, **arguments: object) -> dict[str, Any]:
    """The canonical form of the conversation's call `number` (from 0)."""
    text = json.dumps(arguments, ensure_ascii=False, separators=(",", ":"))
    return {"id": f"functions.{name}:{number}", "type": "function", "function": {"name": name, "arguments": text}}


OPERATORS: dict[type, Callable] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}


DIGITS = 1000
"""Of the longest number that is computed with: exact numbers have no bound of their own, and 1e999999999 is soon written."""


def exact(expression: str) -> Fraction:
    """Value of + - * / // % and parentheses over decimal numbers, exactly. ValueError for anything else, and where a number
    has more than `DIGITS` digits."""

    def value(node: ast.AST) -> Fraction:
        if isinstance(node, ast.Constant) and type(node.value) in (int, float):
            return bounded(Decimal(ast.get_source_segment(text, node).replace("_", "")))
        if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
            return bounded(OPERATORS[type(node.op)](value(node.left), value(node.right)))
        if isinstance(node, ast.UnaryOp) and type(node.op) in OPERATORS:
            return OPERATORS[type(node.op)](value(node.operand))
        raise ValueError(f"cannot compute {expression}")

    def bounded(number: Decimal | Fraction | int) -> Fraction:
        if not (isinstance(number, Decimal) and abs(number.adjusted()) > DIGITS):
            number = Fraction(number)
            if max(abs(number.numerator), number.denominator) < 10**DIGITS:
                return number
        raise ValueError(f"cannot compute {expression}: a number has more than {DIGITS} digits")

    text = expression.strip()
    try:
        return value(ast.parse(text, mode="eval").body)
    except (SyntaxError, ArithmeticError, RecursionError, MemoryError):
        raise ValueError(f"cannot compute {expression}") from None


def decimal_text(number: Fraction, digits: int = 6) -> str:
    """Shortest decimal of a number, rounded half to even after `digits` places."""
    scaled = round(number * 10**digits)
    whole, rest = divmod(abs(scaled), 10**digits)
    sign = "-" if scaled < 0 else ""
    return f"{sign}{whole}.{rest:0{digits}d}".rstrip("0").rstrip(".")


def calculator() -> Tool:
    """Exact arithmetic."""

    def calculate(expression: str) -> str:
        """Value of an arithmetic expression."""
        return decimal_text(exact(expression))

    return tool(calculate)


def key_value(store: dict[str, str]) -> list[Tool]:
    """`get` and `put` on a dictionary that lives as long as the tools do."""

    def get(key: str) -> str:
        """The value stored under a key."""
        if key not in store:
            raise KeyError(f"no key {key}")
        return store[key]

    def put(key: str, value: str) -> str:
        """Store a value under a key."""
        store[key] = value
        return "ok"

    return [tool(get), tool(put)]


BUILT_IN: dict[str, Callable[[], list[Tool]]] = {"calculator": lambda: [calculator()], "key_value": lambda: key_value({})}
"""Tools that need no file."""
