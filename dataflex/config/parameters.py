"""Parameters as a signature declares them: checked by pydantic, described in our own words.

A parameter is declared once, in the constructor: `share: Annotated[float, Gt(0), Le(1)] = 0.5`. Its
type and limits are checked wherever values arrive, `dataflex-cli components` lists them, and a
message is made from them. Most values are used only when training has begun: a word in the place of
a number would end a run at its first update, with a TypeError.

Of an annotation are checked: the types of `EXPECTED`, `Literal`, their unions, and limits on them.
A parameter that mentions any other type is left to its constructor.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np
from annotated_types import DocInfo, Ge, Gt, Interval, Le, Lt, MinLen, doc
from pydantic import AllowInfNan, BeforeValidator, ConfigDict, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from gradstore.errors import BadInput

C = TypeVar("C", bound=type)

#: A number of things, of which there must be one; and one that may be none.
Count = Annotated[int, Ge(1)]
Natural = Annotated[int, Ge(0)]
#: A part of a whole.
Share = Annotated[float, Interval(ge=0, le=1)]
#: A number that is neither 0 nor infinite.
Positive = Annotated[float, Gt(0), AllowInfNan(False)]
#: A model beside the one in training, and the type of its weights.
ModelName = Annotated[str, MinLen(1), doc("a folder or a hub id")]
ModelDtype = Literal["auto", "fp32", "fp16", "bf16"]

#: Types that are checked, and what to write for them.
EXPECTED: Mapping[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    Mapping: "a mapping",
    Sequence: "a list",
}

#: A boolean is no number, a whole number is a number, text is no number and no list.
_STRICT = ConfigDict(strict=True)


class BadParameter(BadInput, ValueError):
    """Values that a constructor's signature refuses, one sentence a line."""


@dataclass(frozen=True)
class Declaration:
    """Declaration of a value's type and limits by an annotation.

    Attributes:
        hint: the annotation.
        adapter: checks values, and converts them where the annotation says how.
    """

    hint: Any
    adapter: TypeAdapter[Any]

    @staticmethod
    def of(hint: Any) -> Declaration:  # noqa: ANN401 - an annotation
        """Read an annotation."""
        return Declaration(hint, TypeAdapter(hint, config=_STRICT))

    def accepts(self, value: object) -> bool:
        """Check a value; a NumPy scalar or array counts as the Python value that it holds."""
        if isinstance(value, np.generic | np.ndarray):
            value = value.tolist()
        try:
            self.adapter.validate_python(value)
        except ValidationError:
            return False
        return True

    def fault(self, name: str, value: object) -> str:
        """Describe an invalid value and the values allowed."""
        shown = "null" if value is None else repr(value)
        return f"{name} is {shown}; {_demand(self.hint, value)}"


def faults(known: Mapping[str, Declaration], values: Mapping[str, Any]) -> list[str]:
    """Return a sentence per value that its declaration refuses; undeclared ones are skipped."""
    return [
        known[name].fault(name, value)
        for name, value in values.items()
        if name in known and not known[name].accepts(value)
    ]


@functools.cache
def declared(constructor: Callable[..., None]) -> Mapping[str, Declaration]:
    """Return the parameters of a constructor whose annotations are checked, by name.

    None are where the annotations cannot be read, because they mention a name that does not exist
    at run time.
    """
    hints = _hints(constructor)
    found = {}
    for name, p in inspect.signature(constructor).parameters.items():
        keyword = p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        hint = hints.get(name, Any) if keyword else Any
        seed = name == "seed" and hint is int  # NumPy's generators take no other
        if (narrowed := _checked_part(Natural if seed else hint)) is not Any:
            found[name] = Declaration.of(narrowed)
    return found


def group(constructor: Callable[..., None]) -> type | None:
    """Return the class whose parameters a constructor's annotated `**rest` stands for, or None.

    `**features: Annotated[Any, FeatureSettings]` takes the parameters of `FeatureSettings`.
    """
    for p in inspect.signature(constructor).parameters.values():
        if p.kind is p.VAR_KEYWORD:
            args = get_args(_hints(constructor).get(p.name))
            return next((part for part in args[1:] if isinstance(part, type)), None)
    return None


@functools.cache
def _hints(constructor: Callable[..., None]) -> Mapping[str, Any]:
    try:
        return get_type_hints(constructor, include_extras=True)
    except Exception:  # evaluating a user's annotations runs code of theirs, which raises anything
        return {}


def checked(cls: C) -> C:
    """Decorate a class: its constructor refuses values that its own signature does not allow.

    `Strategy` applies it to every subclass, so that a strategy built in Python refuses what one
    built from a configuration refuses, and its constructor checks only how parameters relate to
    each other. The signature stays as it is written.

    Raises:
        BadParameter: by the constructor; every value refused, one a line.
    """
    constructor = vars(cls)["__init__"]
    if not inspect.isfunction(constructor):  # a descriptor of the user's own has no signature yet
        return cls
    names = list(inspect.signature(constructor).parameters)

    @functools.wraps(constructor)
    def construct(self: object, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        given = {**dict(zip(names[1:], args, strict=False)), **kwargs}
        if found := faults(declared(constructor), given):
            raise BadParameter("\n".join(found))
        constructor(self, *args, **kwargs)

    cls.__init__ = construct  # type: ignore[misc]
    return cls


def converted(cls: type, given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Convert values as the fields of a dataclass declare them; a null means the default.

    Args:
        cls: annotations of its fields may say how a value is converted (`BeforeValidator`).
        given: values by field; others are skipped.

    Returns:
        The converted values, and one sentence for each that was refused, by field.
    """
    values: dict[str, Any] = {}
    found: dict[str, str] = {}
    for name, field in _fields(cls).items():
        if given.get(name) is None:
            continue
        try:
            values[name] = field.adapter.validate_python(given[name])
        except (ValidationError, TypeError):
            found[name] = f"{field.fault(name, given[name])}."
    return values, found


@functools.cache
def _fields(cls: type) -> Mapping[str, Declaration]:
    hints = get_type_hints(cls, include_extras=True)
    return {name: Declaration.of(hint) for name, hint in hints.items()}


def _checked_part(hint: Any) -> Any:  # noqa: ANN401 - an annotation
    """Return the part of an annotation that is checked; `Any` where it mentions another type.

    What mappings hold, and lists of anything else, is left to the constructor.
    """
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        inner = _checked_part(args[0])
        return Any if inner is Any else Annotated[(inner, *args[1:])]
    if origin in (Union, UnionType):
        kinds = tuple(_checked_part(option) for option in args)
        return Any if Any in kinds else Union[kinds]  # noqa: UP007 - as many as there are
    if origin is Mapping:
        return Mapping
    if origin is Sequence or hint is Sequence:
        element = _checked_part(args[0]) if args else Any
        return Annotated[Sequence[element], BeforeValidator(_no_text)]  # type: ignore[valid-type]
    return hint if origin is Literal or hint is NoneType or hint in EXPECTED else Any


def _no_text(value: object) -> object:
    """Refuse text, which pydantic takes for a sequence where elements may be anything."""
    if isinstance(value, str | bytes):
        raise ValueError("text is no list")
    return value


# -- words ----------------------------------------------------------------------------------------


def describe(hint: Any) -> str:  # noqa: ANN401 - an annotation
    """Describe accepted values: `a number above 0 and finite`, `last, all or a whole number`.

    Examples:
        >>> describe(Literal["last", "all"] | Count), describe(Positive | None)
        ('last, all or a whole number of at least 1', 'a number above 0 and finite, or null')
        >>> describe(Annotated[Sequence[Count], MinLen(2)])
        'a list of at least 2 values, each a whole number of at least 1'
    """
    words: list[str] = []
    null = ""
    for option, metadata in _options(hint):
        if option is NoneType:
            null = ", or null"
        elif get_origin(option) is Literal:
            words += [_shown(value) for value in get_args(option)]
        else:
            words.append(_noun(option, metadata))
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words) + null


def _demand(hint: Any, value: object) -> str:  # noqa: ANN401 - an annotation
    """Describe the values allowed in place of one that an annotation refuses."""
    options = list(_options(hint))
    for option, metadata in options:
        kind = get_origin(option) or option
        if kind in (int, float) and Declaration.of(kind).accepts(value):
            limits = _limits(metadata)
            return f"expected {limits}" if limits == _NOT_NEGATIVE else f"it must be {limits}"
    choice = any(get_origin(option) is Literal for option, _ in options)
    return f"{'choose' if choice else 'expected'} {describe(hint)}"


def _options(hint: Any) -> Iterator[tuple[Any, list[Any]]]:  # noqa: ANN401 - an annotation
    """List the types that an annotation allows, each with its metadata."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        outer = list(_each(args[1:]))
        for option, metadata in _options(args[0]):
            yield option, [*outer, *metadata]
    elif origin in (Union, UnionType):
        for option in args:
            yield from _options(option)
    else:
        yield hint, []


def _each(metadata: Iterable[Any]) -> Iterator[Any]:
    """Yield single constraints: pydantic's `Field` and `Interval` hold several."""
    for part in metadata:
        if isinstance(part, FieldInfo):
            yield from _each(part.metadata)
        elif isinstance(part, Interval):
            yield from part
        else:
            yield part


def _noun(option: Any, metadata: list[Any]) -> str:  # noqa: ANN401 - an annotation
    """Describe one type and its limits: `a number from 0 to 1`."""
    if given := [part.documentation for part in metadata if isinstance(part, DocInfo)]:
        return str(given[0])
    kind = get_origin(option) or option
    noun = EXPECTED.get(kind, getattr(kind, "__name__", str(kind)))
    if limits := _limits(metadata):
        noun += f" {limits}" if limits.startswith(("above", "below", "from")) else f" of {limits}"
        length = next((part.min_length for part in metadata if isinstance(part, MinLen)), None)
        if length is not None:
            noun += f" {_COUNTED.get(kind, 'value')}{'' if length == 1 else 's'}"
    if kind is Sequence and get_args(option) not in ((), (Any,)):
        noun += f", each {describe(get_args(option)[0])}"
    return noun


_NOT_NEGATIVE = "0 or more"

#: What the length of a value counts, where it is not values.
_COUNTED: Mapping[Any, str] = {str: "character"}

#: A limit's attribute and its words.
_VERBS: Mapping[type, tuple[str, str]] = {
    Gt: ("gt", "above"),
    Ge: ("ge", "at least"),
    Lt: ("lt", "below"),
    Le: ("le", "at most"),
    MinLen: ("min_length", "at least"),
}


def _limits(metadata: list[Any]) -> str:
    """Describe limits of a number, or of a list's length: `above 0 and at most 1`."""
    found = {
        kind: getattr(part, attribute)
        for kind, (attribute, _) in _VERBS.items()
        for part in metadata
        if isinstance(part, kind)
    }
    if {Ge, Le} <= set(found):
        words = [f"from {found[Ge]} to {found[Le]}"]
    elif list(found) == [Ge] and found[Ge] == 0:
        words = [_NOT_NEGATIVE]
    else:
        words = [f"{_VERBS[kind][1]} {limit}" for kind, limit in found.items()]
    if any(isinstance(part, AllowInfNan) and not part.allow_inf_nan for part in metadata):
        words.append("finite")
    return " and ".join(words)


def _shown(value: object) -> str:
    return value if isinstance(value, str) else repr(value)
