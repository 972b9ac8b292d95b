"""Read the text form of a precision graph (`mpcompile.text` writes it, and its header describes it)."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from typing import Any

from mpcompile.errors import LawError
from mpcompile.graph import Node, PrecisionGraph, Value
from mpcompile.text import WORD, Opaque, usual_fields

_WORD = re.compile(WORD)
_QUOTED = re.compile(r"""'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*\"""")
_PIECE = re.compile(_QUOTED.pattern + "|.")
_INTEGER = re.compile(r"-?\d+")


def parse_graph(text: str) -> PrecisionGraph:
    """The graph that `mpcompile.text.print_graph` printed (in full detail, not folded).

    Raises:
      LawError: MP412, with the line and column that does not parse.
    """
    graph = PrecisionGraph()
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip() or line.startswith("#"):
            continue
        cursor = Cursor(line, number)
        head = line.partition(" ")[0]
        if head in _STATEMENTS:
            cursor.at = len(head)
            _STATEMENTS[head](graph, cursor)
        else:
            _read_node(graph, cursor)
        cursor.end()
    return graph


class Cursor:
    """A place in a line; each method reads one thing and moves on."""

    def __init__(self, line: str, number: int) -> None:
        self.line, self.number, self.at = line, number, 0

    def sees(self, mark: str) -> bool:
        self.skip()
        return self.line.startswith(mark, self.at)

    def skip(self) -> None:
        while self.line[self.at : self.at + 1] == " ":
            self.at += 1

    def take(self, mark: str) -> bool:
        found = self.sees(mark)
        self.at += len(mark) if found else 0
        return found

    def need(self, mark: str) -> None:
        if not self.take(mark):
            raise self.error(f"{mark!r} expected")

    def word(self) -> str:
        """A bare or quoted word; "" for ``?``."""
        self.skip()
        if self.take("?"):
            return ""
        if found := _QUOTED.match(self.line, self.at):
            self.at = found.end()
            return str(ast.literal_eval(found[0]))
        found = _WORD.match(self.line, self.at)
        if found is None:
            raise self.error("a name expected")
        self.at = found.end()
        return found[0]

    def integer(self) -> int | None:
        self.skip()
        found = _INTEGER.match(self.line, self.at)
        self.at = found.end() if found else self.at
        return int(found[0]) if found else None

    def literal(self) -> Any:
        """A Python literal: up to a space or ``>`` outside brackets and strings."""
        self.skip()
        start, depth = self.at, 0
        while self.at < len(self.line):
            piece = _PIECE.match(self.line, self.at)
            assert piece is not None
            depth += (piece[0] in "([{") - (piece[0] in ")]}")
            if depth < 0 or (depth == 0 and piece[0] in " >"):
                break
            self.at = piece.end()
        try:
            return _evaluate(ast.parse(self.line[start : self.at], mode="eval").body)
        except (SyntaxError, ValueError) as error:
            self.at = start
            raise self.error("a literal expected") from error

    def pairs(self, stop: str = "") -> dict[str, Any]:
        """``key=literal key=literal``, up to `stop` or the end of the line."""
        found: dict[str, Any] = {}
        while not (stop and self.take(stop)) and not self.done():
            key = self.word()
            self.need("=")
            found[key] = self.literal()
        return found

    def done(self) -> bool:
        self.skip()
        return self.at >= len(self.line)

    def end(self) -> None:
        if not self.done():
            raise self.error("the line should end here")

    def error(self, what: str) -> LawError:
        error = LawError("MP412", f"line {self.number}, column {self.at + 1}: {what}")
        error.add_note(f"  {self.line}\n  {' ' * self.at}^")
        return error


def _evaluate(tree: ast.expr) -> Any:
    match tree:
        case ast.Dict(keys=keys, values=values):
            return {_evaluate(k): _evaluate(v) for k, v in zip(keys, values, strict=True) if k is not None}
        case ast.Tuple(elts=items):
            return tuple(map(_evaluate, items))
        case ast.List(elts=items):
            return list(map(_evaluate, items))
        case ast.Call(func=ast.Name(id="obj"), args=[ast.Constant(value=str(text))]):
            return Opaque(text)
        case ast.Name(id="inf" | "nan" as word):
            return float(word)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_evaluate(operand)
        case ast.Constant(value=value):
            return value
    raise ValueError(f"no literal: {ast.dump(tree)}")


def _read_header(graph: PrecisionGraph, cursor: Cursor) -> None:
    while not cursor.done():
        key = cursor.word()
        cursor.need("=")
        graph.header[key] = cursor.word()


def _read_input(graph: PrecisionGraph, cursor: Cursor) -> None:
    name, fields = _read_value(cursor)
    graph.inputs.append(name)
    _add_value(graph, name, fields, None)


def _read_loose(graph: PrecisionGraph, cursor: Cursor) -> None:
    _add_value(graph, *_read_value(cursor), None)


def _read_return(graph: PrecisionGraph, cursor: Cursor) -> None:
    graph.outputs = [] if cursor.done() else _list(cursor, cursor.word)


_STATEMENTS = {"graph": _read_header, "input": _read_input, "value": _read_loose, "return": _read_return}


def _read_node(graph: PrecisionGraph, cursor: Cursor) -> None:
    outputs, op = _read_outputs(cursor)
    cursor.need("(")
    operands = [] if cursor.sees(")") else _list(cursor, lambda: _read_operand(cursor))
    cursor.need(")")
    fields: dict[str, Any] = {"attrs": cursor.literal() if cursor.sees("{") else {}}
    if cursor.take("|"):
        fields |= {name: cursor.word() for name in ("verdict", "precision", "kind", "decided_by")}
        fields["reason"] = cursor.literal() if cursor.sees("'") or cursor.sees('"') else ""
    if cursor.take("@"):
        fields["module"] = cursor.word()
        fields["source"] = cursor.literal() if cursor.sees("'") or cursor.sees('"') else ""
    fields["id"] = outputs[0][0] if outputs else ""
    fields |= cursor.pairs()
    slots = [number if slot is None else slot for number, (_, slot) in enumerate(operands)]
    node = Node(
        op=op, inputs=[name for name, _ in operands], outputs=[name for name, _ in outputs], slots=slots, **fields
    )
    graph.nodes[node.id] = node
    for name, given in outputs:
        _add_value(graph, name, given, node)


def _read_outputs(cursor: Cursor) -> tuple[list[tuple[str, dict[str, Any] | None]], str]:
    """The outputs of a node's line, and its op: an op is followed by ``(``, an output by ``:``."""
    start, first = cursor.at, cursor.word()
    if cursor.sees("("):
        return [], first
    cursor.at = start
    outputs = _list(cursor, lambda: _read_value(cursor))
    cursor.need("=")
    return outputs, cursor.word()


def _list(cursor: Cursor, item: Callable[[], Any]) -> list[Any]:
    found = [item()]
    while cursor.take(","):
        found.append(item())
    return found


def _read_value(cursor: Cursor) -> tuple[str, dict[str, Any] | None]:
    """A value's name, and its fields as far as the line tells them (None: the value does not exist)."""
    name = cursor.word()
    cursor.need(":")
    if cursor.take("?"):
        return name, None
    dtype = cursor.word()
    cursor.need("[")
    shape = () if cursor.sees("]") else tuple(_list(cursor, lambda: _read_dimension(cursor)))
    cursor.need("]")
    return name, {"dtype": dtype, "shape": shape, **(cursor.pairs(">") if cursor.take("<") else {})}


def _add_value(graph: PrecisionGraph, name: str, fields: dict[str, Any] | None, node: Node | None) -> None:
    if fields is not None:
        graph.values[name] = Value(**{**usual_fields(fields["shape"], node), "name": name, **fields})


def _read_dimension(cursor: Cursor) -> int | str:
    number = cursor.integer()
    return cursor.word() if number is None else number


def _read_operand(cursor: Cursor) -> tuple[str, int | None]:
    slot = cursor.integer()
    if slot is not None:
        cursor.need(":")
    return cursor.word(), slot
