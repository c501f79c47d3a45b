"""Turn a module's source into mutants, each broken in one place, or have it tell what runs."""
import ast
import re
from pathlib import Path
from typing import Any, Iterator, List, NamedTuple, Tuple

TOP = Path(__file__).resolve().parent.parent

SWAPS = {ast.Lt: ("<", "<="), ast.LtE: ("<=", "<"), ast.Gt: (">", ">="), ast.GtE: (">=", ">"),
         ast.Eq: ("==", "!="), ast.NotEq: ("!=", "=="), ast.Is: ("is", "is not"),
         ast.IsNot: ("is not", "is"), ast.In: ("in", "not in"), ast.NotIn: ("not in", "in"),
         ast.And: ("and", "or"), ast.Or: ("or", "and"), ast.Add: ("+", "-"), ast.Sub: ("-", "+"),
         ast.Mult: ("*", "/"), ast.Div: ("/", "*"), ast.FloorDiv: ("//", "*"), ast.Mod: ("%", "*"),
         ast.LShift: ("<<", ">>"), ast.RShift: (">>", "<<"), ast.BitOr: ("|", "&"),
         ast.BitAnd: ("&", "|")}
LOCK = re.compile(rb"\S*(_mutex|_lock|_changed|_lifecycle|_locked\(.*\))")
LEFT_ALONE = re.compile(    # not behaviour, or not a promise: texts for people, types
    r"assert |logger\.debug|__\w+__ = |if TYPE_CHECKING|if __name__|TypeVar\(|(help|metavar)=")
TRAILING_COMMENT = re.compile(r"\s{2,}# .*")
Change = Tuple[str, int, int, bytes]    # operator; from byte to byte; what takes their place


class Mutant(NamedTuple):
    """One change to a module."""
    module: str
    line: int
    column: int
    operator: str
    function: str           # in which it is, by its qualified name; empty: in none
    place: str              # of the statement that must run; or "=" and names that import sets
    start: int
    end: int
    text: bytes

    @property
    def id(self) -> str:
        return f"{self.module}:{self.line}:{self.column}:{self.operator}"

    def source(self) -> bytes:
        whole = (TOP / self.module).read_bytes()
        return whole[:self.start] + self.text + whole[self.end:]

    def diff(self) -> Tuple[str, str]:
        """Return the first line that is different, before and after."""
        pair = [(TOP / self.module).read_text().splitlines(), self.source().decode().splitlines()]
        return next((old.strip(), new.strip()) for old, new in zip(*pair) if old != new)

    def key(self) -> str:
        """Return what names this mutant in the list of equivalent ones.

        Nothing in it changes when a file or a class is renamed, or a comment is rewritten.
        """
        name = self.function.rpartition(".")[2]
        return "\n".join([f"{name} {self.operator}".strip(),
                          *(f"{sign} {TRAILING_COMMENT.sub('', line)}"
                            for sign, line in zip("-+", self.diff()))])


class Finder:
    """Find all mutants of a module."""

    def __init__(self, module: str) -> None:
        self.source = (TOP / module).read_bytes()
        self.module = module
        self.mutants: List[Mutant] = []
        self._starts = [0]
        for line in self.source.splitlines(keepends=True):
            self._starts.append(self._starts[-1] + len(line))
        self._visit(ast.parse(self.source), "", "=")

    def _span(self, node: ast.AST) -> Tuple[int, int]:
        return (self._starts[node.lineno - 1] + node.col_offset,
                self._starts[node.end_lineno - 1] + node.end_col_offset)

    def _visit(self, node: ast.AST, function: str, place: str) -> None:
        start, end = self._span(node) if hasattr(node, "lineno") else (0, 0)
        if LEFT_ALONE.match(self.source[start:end].decode()) or _is_text(node):
            return
        if isinstance(node, ast.stmt):
            place = _place(node) if place[0] != "=" else "=" + " ".join(_names(node, ast.Store))
        for operator, first, last, text in self._changes(node, place):
            line = self.source.count(b"\n", 0, first) + 1
            at = _place(node.body[0]) if isinstance(node, ast.ExceptHandler) else place
            self.mutants.append(Mutant(self.module, line, first - self._starts[line - 1], operator,
                                       function, at, first, last, text))
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            function = f"{function}.{node.name}".lstrip(".")
        for name, value in ast.iter_fields(node):
            if name not in ("annotation", "returns", "decorator_list"):
                is_inside = isinstance(node, ast.FunctionDef) and name in ("body", "args")
                inner = _place(_code(node)[0]) if is_inside else place
                for child in value if isinstance(value, list) else [value]:
                    if isinstance(child, ast.AST):
                        self._visit(child, function, inner)

    def _changes(self, node: ast.AST, place: str) -> Iterator[Change]:
        for kind, find in (
                (ast.Compare, self._compare), (ast.BoolOp, self._logic), (ast.BinOp, self._binary),
                (ast.AugAssign, self._binary), (ast.Constant, self._constant),
                (ast.UnaryOp, self._not), (ast.Return, self._return), (ast.With, self._with),
                (ast.ExceptHandler, self._except), (ast.Call, self._suppress)):
            if isinstance(node, kind):
                yield from find(node)
        if place[0] != "=" and _can_go(node):
            yield ("delete", *self._span(node), b"pass")

    def _swap(self, operator: str, kind: ast.AST, left: ast.AST, right: ast.AST
              ) -> Iterator[Change]:
        """Change the operator between two nodes."""
        start, end = self._span(left)[1], self._span(right)[0]
        if type(kind) in SWAPS:
            old, new = (text.encode() for text in SWAPS[type(kind)])
            start = self.source.index(old, start, end)
            yield operator, start, start + len(old), new

    def _compare(self, node: ast.Compare) -> Iterator[Change]:
        for left, kind, right in zip([node.left, *node.comparators], node.ops, node.comparators):
            yield from self._swap("compare", kind, left, right)

    def _logic(self, node: ast.BoolOp) -> Iterator[Change]:
        for left, right in zip(node.values, node.values[1:]):
            yield from self._swap("logic", node.op, left, right)

    def _binary(self, node: Any) -> Iterator[Change]:
        left, right = ((node.target, node.value) if isinstance(node, ast.AugAssign)
                       else (node.left, node.right))
        if not isinstance(left, ast.JoinedStr) and not isinstance(getattr(left, "value", 0), str):
            yield from self._swap("arithmetic", node.op, left, right)

    def _not(self, node: ast.UnaryOp) -> Iterator[Change]:
        if isinstance(node.op, ast.Not):
            start = self._span(node)[0]
            yield "not", start, start + len("not "), b""

    def _constant(self, node: ast.Constant) -> Iterator[Change]:
        value, new = node.value, []
        if isinstance(value, bool):
            new = [not value]
        elif isinstance(value, (int, float)):
            new = [value + 1, 0][:1 + (value not in (0, 1))]
        elif isinstance(value, (str, bytes)) and value:
            new = [value + (b"X" if isinstance(value, bytes) else "X")]
        for number, each in enumerate(new):
            yield ("constant" + "0" * number, *self._span(node), repr(each).encode())

    def _return(self, node: ast.Return) -> Iterator[Change]:
        if node.value and not isinstance(node.value, ast.Constant):
            start, end = self._span(node)
            yield "return", start + len("return"), end, b" None"

    def _with(self, node: ast.With) -> Iterator[Change]:
        start, end = self._span(node.items[-1].context_expr)
        if LOCK.fullmatch(self.source[start:end].split(b" or ")[-1]):
            yield "lock", self._span(node)[0], end, b"if True"

    def _except(self, node: ast.ExceptHandler) -> Iterator[Change]:
        if node.type:
            yield ("except", *self._span(node.type), b"()")

    def _suppress(self, node: ast.Call) -> Iterator[Change]:
        if getattr(node.func, "id", "") == "suppress":
            yield "except", self._span(node.func)[1], self._span(node)[1], b"()"


def _place(node: ast.AST) -> str:
    return f"{node.lineno}:{node.col_offset}"


def _can_go(node: ast.AST) -> bool:
    """Say whether it is a statement without which a function is still one."""
    value = getattr(node, "value", None)
    return (isinstance(node, (ast.Assign, ast.AugAssign, ast.Delete, ast.Raise, ast.Continue,
                              ast.Break))
            or isinstance(node, ast.Expr) and isinstance(value, ast.Call)
            or isinstance(node, ast.AnnAssign) and value is not None
            or isinstance(node, ast.Return) and value is None)


def _names(node: ast.AST, context: type = ast.expr_context) -> List[str]:
    """Return the names in a statement that are used in this context."""
    return sorted({getattr(each, "id", getattr(each, "attr", "")) for each in ast.walk(node)
                   if isinstance(getattr(each, "ctx", None), context)} - {""})


def _code(function: ast.FunctionDef) -> List[ast.stmt]:
    """Return the statements of a function but its docstring."""
    return function.body[ast.get_docstring(function) is not None:] or function.body


def _is_text(node: ast.AST) -> bool:
    """Say whether it is for people to read, or a format."""
    value = getattr(node, "value", None) if isinstance(node, ast.Constant) else None
    return isinstance(node, ast.JoinedStr) or isinstance(value, str) and bool(set(" %{") & {*value})


class Marker(ast.NodeTransformer):
    """Have each statement in a function leave a mark in `_marks`, a byte of a file, as it runs."""

    def __init__(self) -> None:
        self.places: List[Tuple[str, str, List[str]]] = []      # module, place, names in it
        self._module, self._depth = "", 0

    def mark(self, module: str, text: str) -> str:
        self._module = module
        text = ast.unparse(self.visit(ast.parse(text)))
        return re.sub("(?m)^from __future__.*", r"\g<0>\nfrom sse_core import _marks", text,
                      count=1)

    def visit(self, node: ast.AST) -> Any:
        is_code = self._depth and isinstance(node, ast.stmt) and not (
            isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
        place = (self._module, _place(node), _names(node)) if is_code else None
        self._depth += isinstance(node, ast.FunctionDef)
        self.generic_visit(node)
        self._depth -= isinstance(node, ast.FunctionDef)
        if not place:
            return node
        self.places.append(place)
        return [*ast.parse(f"_marks[{len(self.places) - 1}] = 1").body, node]
