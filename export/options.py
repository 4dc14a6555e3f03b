"""Options that are written down once: a dataclass's fields carry their help, choices and group.

From these fields come the flags of a command line (:func:`add_flags`, :func:`read_flags`), what a settings
file may hold (:func:`read_mapping`), and which values are possible (:func:`check_values`).

>>> @dataclass(frozen=True)
... class Settings:
...     batch: int = option(1, help="batch size of the graph", group="output", least=0)
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, TypeVar, get_args, get_type_hints

from cmt_edge.deploy.errors import InputError, UnknownNameError

T = TypeVar("T")
KEY = "option"
"""Key of an :class:`Option` in the metadata of a dataclass field; a field without a default sets it
itself."""
CUTOFF = 0.4
"""Similarity, 0 to 1, from which on a known name is offered in place of a misspelled one."""


@dataclass(frozen=True)
class Option:
    """What a field says of itself.

    Attributes:
        help: one line for ``--help``; the default is added where the field has one that is worth reading.
        group: key of the group under which ``--help`` shows it.
        choices: the values that are possible, if they can be listed.
        metavar: what stands for the value in ``--help``.
        least: smallest possible number.
        short: one more flag, of one letter.
        shortcuts: (flag, value, help) of flags that set a value.
        what: what an error calls the value, where the field's name does not read well.
    """

    help: str
    group: str
    choices: tuple[str, ...] = ()
    metavar: str | None = None
    least: int | None = None
    short: str | None = None
    shortcuts: tuple[tuple[str, str, str], ...] = ()
    what: str | None = None


def option(
    default: T,
    *,
    help: str,
    group: str,
    choices: tuple[str, ...] = (),
    metavar: str | None = None,
    least: int | None = None,
    short: str | None = None,
    shortcuts: tuple[tuple[str, str, str], ...] = (),
    what: str | None = None,
) -> T:
    """A dataclass field with ``default``; the other arguments are those of :class:`Option`."""
    known = Option(help, group, choices, metavar, least, short, shortcuts, what)
    made: T = field(default=default, metadata={KEY: known})
    return made


def option_of(described_field: Field[Any]) -> Option:
    """What a field says of itself."""
    found: Option = described_field.metadata[KEY]
    return found


def flag_of(described_field: Field[Any]) -> str:
    """The flag that sets a field: ``--calib-size``, or ``--no-build`` of what is on by default."""
    name = described_field.name.replace("_", "-")
    return f"--no-{name}" if described_field.default is True else f"--{name}"


def changed_flags(settings: Any, group: str) -> list[str]:
    """Flags of a group whose values are not the defaults."""
    return [
        flag_of(f)
        for f in fields(settings)
        if option_of(f).group == group and getattr(settings, f.name) != f.default
    ]


def defaults_of(settings: type, group: str) -> dict[str, Any]:
    """Default by field name of every option of a group."""
    return {f.name: f.default for f in fields(settings) if option_of(f).group == group}


# --- the command line -----------------------------------------------------------------------------


def add_flags(parser: argparse.ArgumentParser, settings: type, titles: Mapping[str, str]) -> None:
    """Add every option of a dataclass to ``parser``, in groups.

    A flag that was not given leaves no attribute behind, so that a settings file keeps its say; see
    :func:`read_flags`.

    Args:
        parser: of the command.
        settings: the dataclass.
        titles: group -> its heading, in the order of ``--help``.
    """
    kinds = get_type_hints(settings)
    for group, title in titles.items():
        section = parser.add_argument_group(title)
        for described_field in fields(settings):
            if option_of(described_field).group == group:
                _add_flag(section.add_argument, described_field, kinds[described_field.name])


def _add_flag(add: Callable[..., object], described_field: Field[Any], kind: Any) -> None:
    known = option_of(described_field)
    flags = [flag_of(described_field)]
    if known.short:
        flags.insert(0, known.short)
    add(
        *flags,
        dest=described_field.name,
        default=argparse.SUPPRESS,
        help=_help(described_field),
        **_reading(described_field, kind),
    )
    for flag, value, text in known.shortcuts:
        add(
            flag,
            dest=described_field.name,
            default=argparse.SUPPRESS,
            action="store_const",
            const=value,
            help=text,
        )


def _reading(described_field: Field[Any], kind: Any) -> dict[str, Any]:
    """How argparse reads the value of a field of type ``kind``."""
    known, types = option_of(described_field), types_of(kind)
    if kind is bool:
        return {"action": "store_false" if described_field.default else "store_true"}
    if bool in types:
        return {"action": argparse.BooleanOptionalAction}
    number = next((t for t in types if t in (int, float)), None)
    choices = f"{{{','.join(known.choices)}}}" if known.choices else None
    return {"type": number, "metavar": known.metavar or choices}


def _help(described_field: Field[Any]) -> str:
    """The help of a field with its default, as argparse wants it: ``%`` doubled."""
    default = described_field.default
    worth_reading = default is not MISSING and default is not None and not isinstance(default, bool)
    text = option_of(described_field).help + (f" (default: {default})" if worth_reading else "")
    return text.replace("%", "%%")


def read_flags(args: argparse.Namespace, settings: type) -> dict[str, Any]:
    """The options that stood on the command line."""
    return {f.name: getattr(args, f.name) for f in fields(settings) if hasattr(args, f.name)}


# --- the settings file ----------------------------------------------------------------------------


def types_of(kind: Any) -> tuple[type, ...]:
    """The types in an annotation such as ``int | None``, without ``None``."""
    return tuple(t for t in (get_args(kind) or (kind,)) if t is not type(None))


def read_mapping(values: Mapping[str, Any], settings: type, where: object = None) -> dict[str, Any]:
    """The content of a settings file by field name; its keys are field names or flags.

    Raises:
        UnknownNameError: a key is no option.
        InputError: a value has another type than its option.
    """
    kinds = get_type_hints(settings)
    known = [f.name for f in fields(settings)]
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = key.replace("-", "_")
        if name not in known:
            raise UnknownNameError("setting", key, difflib.get_close_matches(name, known, n=2), sorted(known))
        _check_type(key, value, kinds[name], where)
        found[name] = value
    return found


def _check_type(key: str, value: Any, kind: Any, where: object) -> None:
    """Raise :class:`InputError` unless ``value`` has the type ``kind``; a whole number is a number too."""
    types = types_of(kind)
    optional = type(None) in get_args(kind)
    fits = type(value) in types or (float in types and type(value) is int) or (optional and value is None)
    if not fits:
        names = " or ".join(t.__name__ for t in types)
        raise InputError(f"{key} = {value!r} should be {names}", where=where, remedy="correct the file")


# --- values ---------------------------------------------------------------------------------------


def check_values(settings: Any) -> None:
    """Raise :class:`InputError` for the first value that is not among its choices or below its least."""
    for described_field in fields(settings):
        known, value = option_of(described_field), getattr(settings, described_field.name)
        if value is None:
            continue
        if known.choices:
            require_choice(known.what or described_field.name, value, known.choices)
        if known.least is not None:
            require_least(flag_of(described_field), value, known.least)


def require_choice(what: str, value: str, known: Iterable[str]) -> None:
    """Raise :class:`UnknownNameError` with the closest names unless ``value`` is one of ``known``."""
    names = tuple(known)
    if value not in names:
        raise UnknownNameError(
            what, value, difflib.get_close_matches(value, names, n=2, cutoff=CUTOFF), names
        )


def require_least(flag: str, value: float, least: int) -> None:
    """Raise :class:`InputError` if ``value`` is below ``least``, or not a number."""
    if not value >= least:
        raise InputError(f"{flag} {value} is too small", remedy=f"give {least} or more")
