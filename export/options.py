"""Options that are written down once: a dataclass's fields carry their help, choices and group.

From these fields come the flags of a command line (:func:`add_flags`, :func:`read_flags`), what a settings
file may hold (:func:`read_mapping`), and which values are possible (:func:`check_values`).

>>> @dataclass(frozen=True)
... class Settings:
...     batch: int = option(1, help="batch size of the graph", group="output", range=BATCH)
"""

from __future__ import annotations

import argparse
import difflib
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, TypeVar, get_args, get_type_hints

from cmt_edge.deploy.cli.ranges import Range
from cmt_edge.deploy.errors import InputError, UnknownNameError

from .said_flags import SayOnce, SayOnOrOff, fold_case

T = TypeVar("T")
"""The dataclass whose fields are options."""

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
        choices: the values that are possible, if they can be listed; they may be written in any case.
        names: values with a meaning of their own beside paths; they may be written in any case too.
        bare: what the flag means without a value; ``None``: it needs one.
        metavar: what stands for the value in ``--help``.
        range: the numbers that are possible; every number has one.
        short: one more flag, of one letter.
        shortcuts: (flag, value, help) of flags that set a value.
        what: what an error calls the value, where the field's name does not read well.
        written: types besides its own in which a settings file may write a text: a number, or a list, whose
            items are joined by commas.
        is_list: whether a list stays one, because its items may hold commas.
    """

    help: str
    group: str
    choices: tuple[str, ...] = ()
    metavar: str | None = None
    range: Range | None = None
    short: str | None = None
    shortcuts: tuple[tuple[str, str, str], ...] = ()
    what: str | None = None
    written: tuple[type, ...] = ()
    is_list: bool = False
    names: tuple[str, ...] = ()
    bare: str | None = None


def make_option(
    default: T,
    *,
    help: str,
    group: str,
    choices: tuple[str, ...] = (),
    metavar: str | None = None,
    range: Range | None = None,
    short: str | None = None,
    shortcuts: tuple[tuple[str, str, str], ...] = (),
    what: str | None = None,
    written: tuple[type, ...] = (),
    is_list: bool = False,
    names: tuple[str, ...] = (),
    bare: str | None = None,
) -> T:
    """A dataclass field with ``default``; the other arguments are those of :class:`Option`."""
    known = Option(
        help,
        group,
        choices,
        metavar,
        range,
        short,
        shortcuts,
        what,
        written,
        is_list,
        names,
        bare,
    )
    made: T = field(default=default, metadata={KEY: known})
    return made


def get_option(described_field: Field[Any]) -> Option:
    """What a field says of itself."""
    found: Option = described_field.metadata[KEY]
    return found


def make_flag(described_field: Field[Any]) -> str:
    """The flag that sets a field: ``--calib-size``, or ``--no-build`` of what is on by default."""
    name = described_field.name.replace("_", "-")
    return f"--no-{name}" if described_field.default is True else f"--{name}"


def list_changed_flags(settings: Any, group: str) -> list[str]:
    """Flags of a group whose values are not the defaults."""
    return [
        make_flag(f)
        for f in fields(settings)
        if get_option(f).group == group and getattr(settings, f.name) != f.default
    ]


def read_defaults(settings: type, group: str) -> dict[str, Any]:
    """Default by field name of every option of a group."""
    of_group = [f for f in fields(settings) if get_option(f).group == group]
    return {f.name: f.default for f in of_group}


# --- the command line -----------------------------------------------------------------------------


def add_flags(
    parser: argparse.ArgumentParser,
    settings: type,
    titles: Mapping[str, str],
) -> None:
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
            if get_option(described_field).group == group:
                _add_flag(
                    section.add_argument,
                    described_field,
                    kinds[described_field.name],
                )


def _add_flag(
    add: Callable[..., object],
    described_field: Field[Any],
    kind: Any,
) -> None:
    known = get_option(described_field)
    flags = [make_flag(described_field)]
    if known.short:
        flags.insert(0, known.short)
    add(
        *flags,
        dest=described_field.name,
        default=argparse.SUPPRESS,
        help=_write_help(described_field),
        **_describe_reading(described_field, kind),
    )
    for flag, value, text in known.shortcuts:
        add(
            flag,
            dest=described_field.name,
            default=argparse.SUPPRESS,
            action=SayOnce,
            nargs=0,
            const=value,
            help=text,
        )


def _describe_reading(described_field: Field[Any], kind: Any) -> dict[str, Any]:
    """How argparse reads the value of a field of type ``kind``."""
    known, types = get_option(described_field), list_types(kind)
    if kind is bool:
        return {"action": "store_false" if described_field.default else "store_true"}
    if bool in types:
        return {"action": SayOnOrOff}
    number = next((t for t in types if t in (int, float)), None)
    choices = f"{{{','.join(known.choices)}}}" if known.choices else None
    optional = {"nargs": "?", "const": known.bare} if known.bare is not None else {}
    repeated = {"action": SayOnce} if known.shortcuts else {}
    return (
        optional
        | repeated
        | {
            "type": _choose_reader(number, known.range),
            "metavar": known.metavar or choices,
        }
    )


def _choose_reader(
    kind: type | None,
    numbers: Range | None,
) -> Callable[[str], Any] | None:
    """What makes a number of the text on the command line; ``None`` for a text."""
    if kind is None or numbers is None:
        return kind
    return numbers.parse_number if kind is float else numbers.parse_whole


def _write_help(described_field: Field[Any]) -> str:
    """The help of a field with its default, as argparse wants it: ``%`` doubled."""
    default = described_field.default
    worth_reading = default is not MISSING and default is not None and not isinstance(default, bool)
    text = get_option(described_field).help + (f" (default: {default})" if worth_reading else "")
    return text.replace("%", "%%")


def read_flags(args: argparse.Namespace, settings: type) -> dict[str, Any]:
    """The options that stood on the command line."""
    given = [f.name for f in fields(settings) if hasattr(args, f.name)]
    return {name: getattr(args, name) for name in given}


# --- the settings file ----------------------------------------------------------------------------


WRITABLE = (str, int, float, bool)
"""Types of values that a flag or a settings file can hold; other types of a field are for Python alone."""


def list_types(kind: Any) -> tuple[type, ...]:
    """The types in an annotation such as ``int | None`` that are among :data:`WRITABLE`."""
    return tuple(t for t in (get_args(kind) or (kind,)) if t in WRITABLE)


@dataclass(frozen=True)
class _Spelling:
    """A key of a settings file.

    Attributes:
        field: name of the field that it sets.
        meaning: of a key that is true or false, what each sets; ``None`` sets nothing. Other keys hold the
            field's value itself.
    """

    field: str
    meaning: Mapping[bool, Any] | None = None


def _list_spellings(settings: type) -> dict[str, _Spelling]:
    """Every key of a settings file, with underscores: field names, ``no_NAME`` of what is on or off, and
    shortcuts such as ``int8``."""
    found: dict[str, _Spelling] = {}
    kinds = get_type_hints(settings).values()
    for described_field, kind in zip(fields(settings), kinds, strict=True):
        name = described_field.name
        found[name] = _Spelling(name)
        if bool in list_types(kind):
            found[f"no_{name}"] = _Spelling(name, {True: False, False: True})
        for flag, value, _ in get_option(described_field).shortcuts:
            found[_strip_key(flag)] = _Spelling(name, {True: value, False: None})
    return found


def _strip_key(key: str) -> str:
    """A key without leading hyphens and with underscores."""
    return key.lstrip("-").replace("-", "_")


def read_mapping(
    values: Mapping[str, Any],
    settings: type,
    where: object = None,
) -> dict[str, Any]:
    """The content of a settings file by field name; its keys are field names or flags.

    Raises:
        UnknownNameError: a key is no option.
        InputError: a value has another type than its option, or two keys contradict each other.
    """
    spellings = _list_spellings(settings)
    described = {f.name: f for f in fields(settings)}
    kinds = get_type_hints(settings)
    found: dict[str, Any] = {}
    keys: dict[str, str] = {}
    for key, value in values.items():
        spelling = spellings.get(_strip_key(key))
        if spelling is None:
            raise _make_unknown_setting_error(key, spellings, described, where)
        name = spelling.field
        if spelling.meaning is None:
            meant = _convert(key, value, described[name], kinds[name], where)
        elif type(value) is bool:
            meant = spelling.meaning[value]
            if meant is None:
                continue
        else:
            raise _make_wrong_type_error(key, value, (bool,), where)
        if name in found and fold_case(found[name]) != fold_case(meant):
            raise _make_contradiction_error(keys[name], key, where)
        found[name], keys[name] = meant, key
    return found


def _make_unknown_setting_error(
    key: str,
    spellings: Iterable[str],
    names: Iterable[str],
    where: object,
) -> UnknownNameError:
    close = difflib.get_close_matches(_strip_key(key), spellings, n=2)
    return UnknownNameError("setting", key, close, sorted(names), where)


def _make_contradiction_error(first: str, second: str, where: object) -> InputError:
    return InputError(
        f"{first} and {second} contradict each other",
        where=where,
        remedy="keep one of them",
    )


def _convert(
    key: str,
    value: Any,
    described_field: Field[Any],
    kind: Any,
    where: object,
) -> Any:
    """``value`` in the type ``kind`` of its field: a whole number is a number too, and a text may be written
    in the other types that its option allows.

    Raises :class:`InputError` for other types.
    """
    types = list_types(kind)
    optional = type(None) in get_args(kind)
    is_whole = float in types and type(value) is int
    if type(value) in types or is_whole or (optional and value is None):
        return value
    written = get_option(described_field).written
    if type(value) not in written:
        raise _make_wrong_type_error(key, value, (*types, *written), where)
    if type(value) is not list:
        return str(value)
    are_plain = all(type(item) in (str, int, float) for item in value)
    if not value or not are_plain:
        raise InputError(
            f"{key} = {value!r} should be a list of names or numbers",
            where=where,
            remedy="correct the file",
        )
    items = list(map(str, value))
    return items if get_option(described_field).is_list else ",".join(items)


def _make_wrong_type_error(
    key: str,
    value: Any,
    types: Iterable[type],
    where: object,
) -> InputError:
    names = " or ".join(t.__name__ for t in types)
    return InputError(
        f"{key} = {value!r} should be {names}",
        where=where,
        remedy="correct the file",
    )


# --- values ---------------------------------------------------------------------------------------


def fold_names(settings: Any) -> dict[str, str]:
    """Field -> the name that a user wrote in another case: ``OpenVINO`` is ``openvino``, ``Random`` is
    ``random`` unless a file is called so."""
    found = {}
    for described_field in fields(settings):
        known, value = get_option(described_field), getattr(settings, described_field.name)
        if not isinstance(value, str):
            continue
        folded = value.lower()
        if folded in known.choices or (folded in known.names and not os.path.exists(value)):
            found[described_field.name] = folded
    return found


def check_values(settings: Any) -> None:
    """Raise :class:`InputError` for the first value that is empty, not among its choices or out of range."""
    for described_field in fields(settings):
        known, value = (
            get_option(described_field),
            getattr(settings, described_field.name),
        )
        if value is None:
            continue
        if isinstance(value, str) and not value:
            raise InputError(
                f"{make_flag(described_field)} is empty",
                remedy="give a value, or leave it out",
            )
        if isinstance(value, str) and "\0" in value:
            raise InputError(
                f"{make_flag(described_field)} {value!r} holds a NUL character",
                remedy="correct the settings file",
            )
        if known.choices:
            require_choice(
                known.what or described_field.name,
                str(value),
                known.choices,
            )
        if known.range is not None:
            require_range(make_flag(described_field), value, known.range)


def require_choice(what: str, value: str, known: Iterable[str]) -> None:
    """Raise :class:`UnknownNameError` with the closest names unless ``value`` is one of ``known``."""
    names = tuple(known)
    if value not in names:
        raise UnknownNameError(
            what,
            value,
            difflib.get_close_matches(value.lower(), names, n=2, cutoff=CUTOFF),
            names,
        )


def require_range(flag: str, value: Any, numbers: Range) -> None:
    """Raise :class:`InputError` if ``value`` is no number that the flag takes."""
    if fault := numbers.find_fault(value):
        raise InputError(f"{flag} {value} {fault}", remedy=f"give {numbers}")
