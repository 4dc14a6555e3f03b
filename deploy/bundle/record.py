"""Frozen dataclasses as JSON and back; what is read is checked field by field.

A field's type says what JSON may hold there: ``str``, ``int``, ``float``, ``bool``, ``None``, ``list[T]``,
``tuple[T, ...]``, ``tuple[T, T]``, ``dict[str, T]``, unions of these, and other dataclasses. ``Annotated``
adds a :class:`Between`, a :class:`Matches` or a :class:`OneOf`. A field with a default may be missing, any
other may not.
"""

from __future__ import annotations

import json
import math
import re
import typing
from collections import Counter
from collections.abc import Iterable
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from functools import cache
from types import MappingProxyType, NoneType, UnionType
from typing import Annotated, Any, TypeVar

from ..errors import BundleError, StepError
from ..escaping import SHOWN_CHARACTERS

T = TypeVar("T")
"""The dataclass that is read from JSON."""

REMEDY = "copy the whole bundle again, or export it again"
"""What to do about a bundle that cannot be read."""
MAX_CHARACTERS = 1 << 16
"""The largest number of characters of a text."""
MAX_WHOLE = 1 << 64
"""The largest size of a whole number, whichever sign it has."""

OMITTED = MappingProxyType({"absent": "omitted"})
"""Metadata of a field whose key is left out of the JSON where the value is ``None``."""
EMPTIED = MappingProxyType({"absent": "emptied"})
"""Metadata of a field that JSON holds as ``{}`` where the value is ``None``."""

_KINDS: dict[Any, str] = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    list: "a list",
    dict: "an object",
    NoneType: "null",
}
"""Type of a JSON value -> what a message calls it."""


@dataclass(frozen=True)
class Between:
    """A rule of a number: at least ``low`` and, unless it is ``None``, at most ``high``."""

    low: float
    high: float | None = None

    def holds(self, value: Any) -> bool:
        if not self.low <= value:  # NaN is below nothing
            return False
        return self.high is None or bool(value <= self.high)

    def __str__(self) -> str:
        return f"at least {self.low}" if self.high is None else f"{self.low} to {self.high}"


@dataclass(frozen=True)
class Matches:
    """A rule of a text: the regular expression ``pattern`` matches all of it; messages quote ``meaning``."""

    pattern: str
    meaning: str

    def holds(self, value: Any) -> bool:
        return re.fullmatch(self.pattern, value) is not None

    def __str__(self) -> str:
        return self.meaning


@dataclass(frozen=True)
class OneOf:
    """A rule of a text: it is one of the known ``words``."""

    words: tuple[str, ...]

    def holds(self, value: Any) -> bool:
        return value in self.words

    def __str__(self) -> str:
        return " or ".join(map(repr, self.words))


def make_plain(value: Any) -> Any:
    """``value`` with every dataclass in it, at any depth, as a dictionary that JSON can hold."""
    if is_dataclass(value) and not isinstance(value, type):
        return dict(_iterate_members(value))
    if isinstance(value, dict):
        return {key: make_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(make_plain, value))
    return value


def _iterate_members(record: Any) -> Iterable[tuple[str, Any]]:
    """Key and value of every field of a dataclass that is written."""
    for member in fields(record):
        value = getattr(record, member.name)
        if value is None and member.metadata == EMPTIED:
            yield member.name, {}
        elif value is not None or member.metadata != OMITTED:
            yield member.name, make_plain(value)


def parse_json(data: bytes, where: object, whole: str = "the manifest") -> Any:
    """What a file's JSON holds; raises :class:`BundleError`. Arguments as :func:`read_record`."""
    try:
        return json.loads(data, object_pairs_hook=make_object)
    except (ValueError, RecursionError) as exc:
        raise BundleError(
            f"{whole} cannot be read",
            where=where,
            why=exc,
            remedy=REMEDY,
        ) from exc


def make_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON. Raises ``ValueError`` where a key stands in it twice: readers differ in which of the
    two values they take."""
    content = dict(pairs)
    if len(content) != len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the entry {_show_content(twice)} stands in it twice")
    return content


def read_record(
    kind: type[T],
    content: object,
    where: object,
    whole: str = "the manifest",
    remedy: str = REMEDY,
) -> T:
    """A dataclass ``kind`` from parsed JSON.

    Args:
        kind: a dataclass.
        content: what ``json.loads`` gave.
        where: the file that errors name.
        whole: what errors call the content as a whole.
        remedy: what errors tell the user to do.

    Raises:
        BundleError: an entry is missing, unknown, of another type or out of range; the message names its
            path, for example ``model.weights.sha256``.
    """
    result: T = _Reader(where, whole, remedy).read(kind, content, "")
    return result


def read_message(kind: type[T], content: object, whole: str) -> T:
    """A dataclass ``kind`` from what a child process and this one say to each other.

    ``whole`` is what errors call it. Raises :class:`StepError`, because both sides are of this program.
    """
    try:
        return read_record(kind, content, None, whole)
    except BundleError as exc:
        raise StepError(
            "this program and its child process do not understand each other",
            why=exc.what,
            remedy="install cmt-edge again; if that does not help, report it",
        ) from exc


class _Reader:
    """Reads values of one file; a ``path`` names the entry from the top, with dots."""

    def __init__(self, where: object, whole: str, remedy: str) -> None:
        self.where, self.whole, self.remedy = where, whole, remedy

    def read(self, kind: Any, content: Any, path: str) -> Any:
        """``content`` as the type ``kind``."""
        origin = typing.get_origin(kind)
        if origin is Annotated:
            return self._read_ruled(kind, content, path)
        if origin in (UnionType, typing.Union):
            return self._read_one_of(typing.get_args(kind), content, path)
        if is_dataclass(kind):
            return self._read_record(kind, content, path)
        if not _fits(kind, content):
            raise self._make_wrong_type_error(content, path, _name_type(kind))
        if origin is None:
            return self._read_scalar(kind, content, path)
        return self._read_container(
            origin,
            typing.get_args(kind),
            content,
            path,
        )

    def _read_ruled(self, kind: Any, content: Any, path: str) -> Any:
        inner, *rules = typing.get_args(kind)
        value = self.read(inner, content, path)
        for rule in rules:
            if not rule.holds(value):
                raise self._make_wrong_type_error(content, path, str(rule))
        return value

    def _read_one_of(
        self,
        kinds: tuple[Any, ...],
        content: Any,
        path: str,
    ) -> Any:
        for kind in kinds:
            if _fits(kind, content):
                return self.read(kind, content, path)
        raise self._make_wrong_type_error(
            content,
            path,
            " or ".join(map(_name_type, kinds)),
        )

    def _read_record(self, kind: Any, content: Any, path: str) -> Any:
        if not isinstance(content, dict):
            raise self._make_wrong_type_error(content, path, "an object")
        known = {member.name: member for member in fields(kind)}
        if unknown := [repr(key) for key in content if key not in known]:
            raise self._make_error(f"{path or self.whole} holds unknown entries: {_format_list(unknown)}")
        absent = [name for name in known if name not in content]
        missing = [name for name in absent if _is_required(known[name])]
        if missing:
            raise self._make_error(f"{path or self.whole} lacks entries: {', '.join(missing)}")
        kinds = _find_types(kind)
        return kind(
            **{
                name: self._read_member(known[name], kinds[name], value, _extend_path(path, name))
                for name, value in content.items()
            }
        )

    def _read_member(
        self,
        member: Field[Any],
        kind: Any,
        content: Any,
        path: str,
    ) -> Any:
        if content == {} and member.metadata == EMPTIED:
            return None
        return self.read(kind, content, path)

    def _read_container(
        self,
        origin: Any,
        kinds: tuple[Any, ...],
        content: Any,
        path: str,
    ) -> Any:
        if origin is dict:
            return self._read_dictionary(kinds[1], content, path)
        if origin is list or kinds[-1] is Ellipsis:
            kinds = (kinds[0],) * len(content)
        if len(kinds) != len(content):
            raise self._make_wrong_type_error(content, path, f"{len(kinds)} items")
        return origin(self._read_items(kinds, content, path))

    def _read_dictionary(
        self,
        kind: Any,
        content: dict[str, Any],
        path: str,
    ) -> dict[str, Any]:
        return {
            self._read_scalar(str, key, path): self.read(kind, value, _extend_path(path, key))
            for key, value in content.items()
        }

    def _read_items(
        self,
        kinds: tuple[Any, ...],
        content: list[Any],
        path: str,
    ) -> list[Any]:
        pairs = zip(kinds, content, strict=True)
        return [self.read(kind, item, f"{path}[{i}]") for i, (kind, item) in enumerate(pairs)]

    def _read_scalar(self, kind: Any, content: Any, path: str) -> Any:
        if kind is str and len(content) > MAX_CHARACTERS:
            raise self._make_wrong_type_error(content, path, f"text of at most {MAX_CHARACTERS} characters")
        if kind is str and find_text_fault(content):
            raise self._make_wrong_type_error(content, path, "text without half characters")
        if kind is int and abs(content) > MAX_WHOLE:
            raise self._make_wrong_type_error(content, path, "a whole number of at most 64 bits")
        if kind is float and not _is_float(content):
            raise self._make_wrong_type_error(content, path, "a finite number")
        return content

    def _make_wrong_type_error(
        self,
        content: Any,
        path: str,
        expected: str,
    ) -> BundleError:
        return self._make_error(f"{path or self.whole} is {_show_content(content)}, expected {expected}")

    def _make_error(self, what: str) -> BundleError:
        return BundleError(what, where=self.where, remedy=self.remedy)


@cache
def _find_types(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind, include_extras=True)


def _is_required(member: Field[Any]) -> bool:
    return member.default is MISSING and member.default_factory is MISSING


def _find_json_type(kind: Any) -> Any:
    """The Python type that ``json.loads`` gives for a value of type ``kind``."""
    origin = typing.get_origin(kind)
    if origin is Annotated:
        return _find_json_type(typing.get_args(kind)[0])
    if is_dataclass(kind):
        return dict
    return {tuple: list, list: list, dict: dict}.get(origin, kind)


def _fits(kind: Any, content: Any) -> bool:
    """Whether ``content`` is of the right sort; what it contains is not looked at."""
    wanted = _find_json_type(kind)
    if wanted is float:
        return isinstance(content, (int, float)) and not isinstance(content, bool)
    return type(content) is wanted


def _name_type(kind: Any) -> str:
    return _KINDS[_find_json_type(kind)]


def _show_content(content: Any) -> str:
    """A wrong value for a message: short, and safe to print."""
    if isinstance(content, (list, dict)):
        return (
            f"{_KINDS[type(content)]} of {len(content)} items"
            if content
            else f"an empty {_name_content(content)}"
        )
    if isinstance(content, str):
        return repr(content if len(content) <= SHOWN_CHARACTERS else f"{content[:SHOWN_CHARACTERS]}...")
    if content is None or isinstance(content, bool):
        return {None: "null", True: "true", False: "false"}[content]
    is_short = isinstance(content, float) or abs(content) <= MAX_WHOLE
    text = repr(content) if is_short else "a huge number"
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..."


def _name_content(content: list[Any] | dict[str, Any]) -> str:
    return "list" if isinstance(content, list) else "object"


def _format_list(names: list[str]) -> str:
    text = ", ".join(sorted(names))
    return text if len(text) <= 5 * SHOWN_CHARACTERS else f"{text[: 5 * SHOWN_CHARACTERS]}..."


def _extend_path(path: str, name: str) -> str:
    """The path of an entry; a name that could not be printed is quoted."""
    is_short = len(name) <= 2 * SHOWN_CHARACTERS
    shown = name if is_short and name.isprintable() else _show_content(name)
    return f"{path}.{shown}" if path else shown


def find_text_fault(text: str) -> str:
    """What is wrong with a text of a manifest, empty if nothing is. JSON can hold half of a surrogate pair,
    which no file in UTF-8 can."""
    if len(text) > MAX_CHARACTERS:
        return f"has more than {MAX_CHARACTERS} characters"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "has half of a character"
    return ""


def _is_float(number: float) -> bool:
    """Whether a number, which may be a whole one of any size, can be computed with as a float."""
    try:
        return math.isfinite(number)
    except OverflowError:
        return False
