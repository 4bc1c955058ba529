"""Classes as their source declares them, read without importing them.

The names that a configuration may use are those of strategies, whose modules import torch, and of
LlamaFactory's arguments, whose modules import transformers: several seconds before a misspelt word
could be told. Their source says the names at once.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

#: Bases that take no parameters of a strategy.
_WITHOUT_PARAMETERS = ("ABC", "Protocol", "object")


@dataclass(frozen=True)
class SourceField:
    """A dataclass's field.

    Attributes:
        name: its name.
        help: its `metadata["help"]`, or the docstring below it; "" without one.
        owner: the class that declares it, after its package: `transformers.TrainingArguments`.
        types: names of the types in its annotation, `None` left out; a `Literal` is one of them.
        choices: the values of its `Literal`, if it has one.
    """

    name: str
    help: str
    owner: str
    types: frozenset[str] = frozenset()
    choices: tuple[object, ...] = ()


@dataclass(frozen=True)
class SourceClass:
    """A class statement and the module it stands in."""

    module: str
    node: ast.ClassDef

    def bases(self) -> list[SourceClass | None]:
        """Return the bases; None for one whose source is not found, such as a subscripted one."""
        named = [base for base in self.node.bases if ast.unparse(base) not in _WITHOUT_PARAMETERS]
        return [
            find_class(self.module, base.id) if isinstance(base, ast.Name) else None
            for base in named
        ]

    def family(self) -> Iterator[SourceClass | None]:
        """Yield the class and its bases, each before its own bases."""
        yield self
        for base in self.bases():
            if base is None:
                yield None
            else:
                yield from base.family()

    def fields(self) -> dict[str, SourceField]:
        """Return a dataclass's fields that its constructor takes, those of its bases first."""
        found: dict[str, SourceField] = {}
        for base in reversed(self.bases()):
            found |= base.fields() if base is not None else {}
        body = self.node.body
        for statement, after in zip(body, [*body[1:], None], strict=True):
            if not isinstance(statement, ast.AnnAssign) or not isinstance(
                statement.target, ast.Name
            ):
                continue
            name, options = statement.target.id, _options(statement.value)
            found.pop(name, None)
            class_variable = "ClassVar" in ast.unparse(statement.annotation)
            if not class_variable and options.get("init") != "False":
                words = options.get("help") or _text(getattr(after, "value", None))
                owner = f"{self.module.partition('.')[0]}.{self.node.name}"
                parts = list(_alternatives(statement.annotation))
                choices = [value for part in parts for value in _literal(part)]
                types = frozenset(ast.unparse(part) for part in parts)
                found[name] = SourceField(
                    name, " ".join(words.split()), owner, types, tuple(choices)
                )
        return found

    def parameters(self) -> frozenset[str] | None:
        """Return the names that the constructor takes; None where it takes any.

        Its `**rest` stands for the parameters of the class it is annotated with, or else of the
        constructor it inherits, as in `registry.parameters`.
        """
        found: frozenset[str] | None = frozenset()
        names: set[str] = set()
        for each in self.family():
            if each is None:  # whatever it takes: the class itself will say
                return None
            if any("dataclass" in ast.unparse(d) for d in each.node.decorator_list):
                return frozenset(names | set(each.fields()))
            init = each._constructor()
            if init is None:
                continue
            names |= {a.arg for a in (*init.args.args[1:], *init.args.kwonlyargs)}
            if init.args.kwarg is None:
                return frozenset(names)
            found = None
            if (group := each._group(init.args.kwarg.annotation)) is not None:
                shared = group.parameters()
                return None if shared is None else frozenset(names | shared)
        return found

    def _constructor(self) -> ast.FunctionDef | None:
        """Return the class's own constructor."""
        functions = (s for s in self.node.body if isinstance(s, ast.FunctionDef))
        return next((f for f in functions if f.name == "__init__"), None)

    def _group(self, annotation: ast.expr | None) -> SourceClass | None:
        """Return the class named in `Annotated[Any, ThatClass]`."""
        if not isinstance(annotation, ast.Subscript) or not isinstance(annotation.slice, ast.Tuple):
            return None
        named = annotation.slice.elts[-1]
        return find_class(self.module, named.id) if isinstance(named, ast.Name) else None


@functools.cache
def find_class(module: str, name: str) -> SourceClass | None:
    """Find the class that `module` defines, imports or assigns as `name`; None if it does not."""
    path = _path(module)
    if path is None:
        return None
    for node in reversed(list(_statements(_tree(path).body))):
        found: SourceClass | None = None
        if isinstance(node, ast.ClassDef) and node.name == name:
            return SourceClass(module, node)
        if isinstance(node, ast.Assign) and [ast.unparse(t) for t in node.targets] == [name]:
            found = find_class(module, node.value.id) if isinstance(node.value, ast.Name) else None
        elif isinstance(node, ast.ImportFrom):
            wanted = [a.name for a in node.names if (a.asname or a.name) == name]
            found = find_class(_origin(module, path, node), wanted[0]) if wanted else None
        if found is not None:
            return found
    return None


def registered(package: str) -> dict[str, SourceClass]:
    """Return the classes that the package's modules decorate with `@register(kind, name)`."""
    folder = _path(package)
    found = {}
    for path in sorted(folder.parent.glob("*.py")) if folder is not None else []:
        for node in _tree(path).body:
            if not isinstance(node, ast.ClassDef):
                continue
            for call in node.decorator_list:
                if isinstance(call, ast.Call) and ast.unparse(call.func) == "register":
                    found[_text(call.args[1])] = SourceClass(f"{package}.{path.stem}", node)
    return found


def _path(module: str) -> Path | None:
    """Return a module's file; its package is found, not imported."""
    top, *inner = module.split(".")
    spec = importlib.util.find_spec(top)
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        base = Path(folder, *inner)
        for path in (base / "__init__.py", base.with_suffix(".py")):
            if path.is_file():
                return path
    return None


@functools.cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield a module's statements, those under an `if` too."""
    for statement in body:
        yield statement
        if isinstance(statement, ast.If):
            yield from _statements(statement.body)
            yield from _statements(statement.orelse)


def _origin(module: str, path: Path, node: ast.ImportFrom) -> str:
    """Return the full name of the module that an import statement names."""
    if not node.level:
        return node.module or ""
    above = module.split(".")
    above = above[: len(above) - node.level + (path.name == "__init__.py")]
    return ".".join([*above, *([node.module] if node.module else [])])


def _alternatives(annotation: ast.expr) -> Iterator[ast.expr]:
    """Yield the parts of `A | B`, `Optional[A]` or `Union[A, B]`, but not `None`."""
    if isinstance(annotation, ast.BinOp):
        yield from _alternatives(annotation.left)
        yield from _alternatives(annotation.right)
    elif isinstance(annotation, ast.Subscript) and _called(annotation) in ("Optional", "Union"):
        inner = annotation.slice
        for part in inner.elts if isinstance(inner, ast.Tuple) else [inner]:
            yield from _alternatives(part)
    elif isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        yield from _alternatives(ast.parse(annotation.value, mode="eval").body)
    elif not (isinstance(annotation, ast.Constant) and annotation.value is None):
        yield annotation


def _literal(annotation: ast.expr) -> tuple[object, ...]:
    """Return the values of a `Literal[...]`; () for another annotation."""
    if not isinstance(annotation, ast.Subscript) or _called(annotation) != "Literal":
        return ()
    values = ast.literal_eval(annotation.slice)
    return values if isinstance(values, tuple) else (values,)


def _called(annotation: ast.Subscript) -> str:
    """Return the name before the brackets, without its module."""
    return ast.unparse(annotation.value).rpartition(".")[2]


def _options(value: ast.expr | None) -> dict[str, str]:
    """Return the keywords of a `field(...)`, and the help in its metadata."""
    found: dict[str, str] = {}
    for keyword in value.keywords if isinstance(value, ast.Call) else []:
        if keyword.arg == "metadata" and isinstance(keyword.value, ast.Dict):
            pairs = zip(keyword.value.keys, keyword.value.values, strict=True)
            found |= {_text(k): _text(v) for k, v in pairs if k is not None}
        elif keyword.arg is not None:
            found[keyword.arg] = ast.unparse(keyword.value)
    return found


def _text(node: ast.AST | None) -> str:
    """Return the text that a literal, or a sum or a format of some, holds; "" for other code."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.BinOp):
        return _text(node.left) + _text(node.right)
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part) for part in node.values)
    return ""
