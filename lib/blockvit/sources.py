"""What a module's ``forward`` does with the modules below it, as far as its source tells; nothing is called.

The source of ``forward`` is read, and of the methods and properties that it uses. What it names is a path below the
module: ``self.mlp.fc1`` is ``"mlp.fc1"``, and ``self.layers[i]`` is ``"layers.*"``.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterable
from functools import cache, cached_property
from typing import Any, NamedTuple

from torch import nn


class Uses(NamedTuple):
    """Paths of what is used otherwise than by calling it.

    ``weights``: of whose weight something is computed. ``parts``: what is indexed, sliced, iterated, handed on, or gone
    through to something below it, so that one part of it may be called without another.
    """

    weights: frozenset[str]
    parts: frozenset[str]


def stands_among(name: str, paths: Iterable[str]) -> bool:
    """Whether one of ``paths`` is the dotted ``name``, or has ``*`` for parts of it."""
    parts = name.split(".")
    cut = [path.split(".") for path in paths]
    return any(len(p) == len(parts) and all(a in ("*", b) for a, b in zip(p, parts, strict=True)) for p in cut)


def uses(kind: type[nn.Module]) -> Uses:
    """What the ``forward`` of ``kind``, and the methods and properties that it uses, do with modules below."""
    return _uses(kind, kind.forward)


@cache
def _uses(kind: type[nn.Module], forward: Callable[..., Any]) -> Uses:
    """Remembered for this ``forward`` of ``kind``: somebody may put another in its place."""
    found, known, ahead = Uses(frozenset(), frozenset()), set(), {("forward", 0)}
    places = {cls.__name__: place for place, cls in enumerate(kind.__mro__)}
    while ahead:
        known.add(method := ahead.pop())
        tree, place = _source_of(kind, *method)
        read = _Method(tree, places, place)
        found = Uses(found.weights | read.weights, found.parts | read.parts)
        ahead |= read.methods - known
    return found


def _source_of(kind: type, name: str, first: int) -> tuple[ast.AST, int]:
    """A method or property, looked up from the ``first``-th class of ``kind`` on, and the place of its class.

    An empty module if the name is no method or property, belongs to ``nn.Module``, or has no source.
    """
    for place, cls in enumerate(kind.__mro__[first:], first):
        found = vars(cls).get(name)
        if found is None or cls is nn.Module:
            continue
        if isinstance(found, property | cached_property):
            found = found.fget if isinstance(found, property) else found.func
        try:
            if not isinstance(found, type):
                return ast.parse(textwrap.dedent(inspect.getsource(found))), place
        except (OSError, TypeError, SyntaxError):
            pass
        break
    return ast.Module([], []), first


_METADATA = ("dtype", "device", "shape", "size", "ndim", "dim", "numel", "requires_grad", "is_meta", "is_cuda")
"""What may be asked of a weight without computing with it."""

_LIKE = ("to", "type_as")
"""Methods of tensors that ask no more than that of their argument."""


class _Method:
    """One method's ``weights``, ``parts``, and the ``methods`` that it uses: name, and from which class on."""

    def __init__(self, tree: ast.AST, places: dict[str, int], place: int) -> None:
        self.weights: set[str] = set()
        self.parts: set[str] = set()
        self.methods: set[tuple[str, int]] = set()
        self._places, self._place = places, place
        functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)]
        arguments = [*functions[0].args.posonlyargs, *functions[0].args.args] if functions else []
        self._names: dict[str, set[str]] = {arguments[0].arg: {""}} if arguments else {}
        for _ in range(3):  # names for names of names
            for node in ast.walk(tree):
                self._bind(node)
        self._visit(tree, tree)

    def _bind(self, node: ast.AST) -> None:
        """Note what names are given to, in an assignment or a loop."""
        match node:
            case ast.Assign(targets=[ast.Tuple(elts=names)], value=ast.Tuple(elts=values)):
                for name, value in zip(names, values, strict=False):
                    self._name(name, self._paths(value))
            case ast.Assign(targets=targets, value=value):
                for target in targets:
                    within = isinstance(target, ast.Tuple | ast.List)
                    self._name(
                        target, {_join(path, "*") for path in self._paths(value)} if within else self._paths(value)
                    )
            case ast.NamedExpr(target=target, value=value) | ast.AnnAssign(target=target, value=ast.expr() as value):
                self._name(target, self._paths(value))
            case ast.For(target=target, iter=iterated) | ast.comprehension(target=target, iter=iterated):
                self._name(target, {_join(path, "*") for path in self._outermost(iterated)})

    def _name(self, target: ast.AST, paths: set[str]) -> None:
        for node in ast.walk(target):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and paths:
                self._names[node.id] = self._names.get(node.id, set()) | paths

    def _paths(self, node: ast.AST) -> set[str]:
        """What an expression may stand for; empty if that is nothing below the module."""
        match node:
            case ast.Name(id=name):
                return self._names.get(name, set())
            case ast.IfExp(body=one, orelse=other):
                return self._paths(one) | self._paths(other)
            case (
                ast.NamedExpr(value=value)
                | ast.Subscript(value=value, slice=ast.Slice())
                | ast.Call(func=ast.Attribute(value=value, attr="children" | "named_children" | "values" | "items"))
            ):
                return self._paths(value)
            case ast.Attribute(value=value, attr=part):
                pass
            case ast.Subscript(value=value, slice=ast.Constant(value=part)):
                pass
            case ast.Subscript(value=value):
                part = "*"
            case ast.Call(func=ast.Name(id="getattr"), args=[value, ast.Constant(value=part), *_]):
                pass
            case _:
                return set()
        return {_join(path, part) for path in self._paths(value)}

    def _outermost(self, node: ast.AST) -> set[str]:
        """The paths within an expression, such as ``enumerate(self.layers)``."""
        return self._paths(node) or set().union(*map(self._outermost, ast.iter_child_nodes(node)))

    def _visit(self, node: ast.AST, parent: ast.AST) -> None:
        paths = self._paths(node)
        if isinstance(getattr(node, "ctx", None), ast.Store):
            return
        if not paths:
            self._note_parent_class(node)
            for child in ast.iter_child_nodes(node):
                self._visit(child, node)
            return
        self.methods |= {(path.partition(".")[0], 0) for path in paths if path}
        for inner in ast.walk(node):
            if isinstance(inner, ast.Subscript):
                self._visit(inner.slice, inner)
                self.parts |= self._paths(inner.value)
        if isinstance(parent, ast.Assign | ast.AnnAssign | ast.NamedExpr):  # what has the name now is looked at there
            return
        for path in paths - {""}:
            self._note(path, node, parent)

    def _note_parent_class(self, node: ast.AST) -> None:
        """``super().forward``, or ``Parent.forward``."""
        match node:
            case ast.Attribute(value=ast.Call(func=ast.Name(id="super")), attr=name):
                self.methods.add((name, self._place + 1))
            case ast.Attribute(value=ast.Name(id=cls), attr=name) if cls in self._places:
                self.methods.add((name, self._places[cls]))

    def _note(self, path: str, node: ast.AST, parent: ast.AST) -> None:
        parts = path.split(".")
        self.parts |= {".".join(parts[:end]) for end in range(1, len(parts))}
        call = parent if isinstance(parent, ast.Call) else None
        if not isinstance(parent, ast.Compare) and (call is None or call.func is not node):
            self.parts.add(path)
        if "weight" not in parts[1:]:
            return
        layer, asked = parts[: (at := parts.index("weight", 1))], parts[at + 1 :]
        like = call is not None and isinstance(call.func, ast.Attribute) and call.func.attr in _LIKE
        if (asked[0] in _METADATA) if asked else (like and node in call.args):
            return
        self.weights.add(".".join(layer))


def _join(path: str, part: Any) -> str:
    return f"{path}.{part}" if path else str(part)
