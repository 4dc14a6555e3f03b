"""Objects of other programs' classes in a checkpoint, and the stand-ins that are made in their place.

Training programs put their settings beside the weights as objects: yacs, OmegaConf, EasyDict, random
generators, classes of the user's own. ``torch.load(weights_only=True)`` refuses them, because it would have
to import and call their classes. It need not: nobody reads these objects. Before a file is loaded, its pickle
is read as a list of opcodes, without running any of them. Each class that it names gets a stand-in, which
keeps what it is given and calls nothing. The classes themselves are never imported.

Names that honest settings do not hold are left to torch, which refuses them: functions of Python's standard
library, of torch, of NumPy and of this package.
"""

from __future__ import annotations

import pickletools
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from .unpickling import ALLOWED

ZIP_START = b"PK"
"""First bytes of the files that torch.save has written since PyTorch 1.6."""

LEGACY_HEADERS = 3
"""Number of pickles before that of the content in the files that torch.save wrote before: a magic number,
the version of the format, and the machine."""

VALUE_MODULES = (
    "calendar",
    "collections",
    "datetime",
    "decimal",
    "enum",
    "fractions",
    "ipaddress",
    "logging",
    "random",
    "re",
    "string",
    "time",
    "typing",
    "uuid",
    "zoneinfo",
)
"""Modules of the standard library whose classes are values."""

PYTHON_2 = {
    "BaseHTTPServer": "http",
    "CGIHTTPServer": "http",
    "ConfigParser": "configparser",
    "Cookie": "http",
    "DocXMLRPCServer": "xmlrpc",
    "HTMLParser": "html",
    "Queue": "queue",
    "SimpleHTTPServer": "http",
    "SimpleXMLRPCServer": "xmlrpc",
    "SocketServer": "socketserver",
    "StringIO": "io",
    "Tkinter": "tkinter",
    "UserDict": "collections",
    "UserList": "collections",
    "UserString": "collections",
    "__builtin__": "builtins",
    "_abcoll": "collections",
    "_winreg": "winreg",
    "anydbm": "dbm",
    "cPickle": "pickle",
    "cStringIO": "io",
    "commands": "subprocess",
    "cookielib": "http",
    "copy_reg": "copyreg",
    "dbhash": "dbm",
    "dumbdbm": "dbm",
    "dummy_thread": "_thread",
    "exceptions": "builtins",
    "gdbm": "dbm",
    "htmlentitydefs": "html",
    "httplib": "http",
    "markupbase": "_markupbase",
    "repr": "reprlib",
    "robotparser": "urllib",
    "thread": "_thread",
    "urllib2": "urllib",
    "urlparse": "urllib",
    "whichdb": "dbm",
    "xmlrpclib": "xmlrpc",
}
"""Name of a module in Python 2, which the pickles of torch.save still use -> its name now, or that of its
package."""

VALUE_BUILTINS = ("bytes", "object", "slice", "type")
"""Built-in classes that settings name, besides exceptions."""

TORCH_MODULES = (
    "torch.amp",
    "torch.cuda.amp",
    "torch.nn",
    "torch.optim",
    "torch.utils.data",
)
"""Modules of torch, and those inside them, whose classes may stand in settings."""

NUMPY_MODULES = ("numpy.random",)
"""Modules of NumPy, and those inside them, whose objects nobody reads."""

OWN_HELPER = ("cmt_edge.cmt.registry", "find_model")
"""Module and name of the function that the pickles of this package's models name."""

NUMPY_TYPES = frozenset(kind.__name__ for kind in np.sctypeDict.values())
"""Names of NumPy's types of numbers, which settings hold as classes."""

MAX_SHOWN_WAY = 16
"""Number of keys on the way to an object, at most, that are told."""

MARK = object()
"""Stands on the simulated stack where the opcode MARK was."""

MAX_OPCODES = 3_000_000
"""Number of opcodes in the pickles of a file, at most; a training state of 3,000 tensors has 400,000."""

MAX_WORK = 50_000_000
"""Number of values, at most, that are counted, compared or copied while a pickle is loaded, where one that is
held twice counts twice: a tuple of some hundred bytes may hold itself in 2^60 ways, and the key of a
dictionary is computed from all of them."""

MAX_WEIGHT = 1 << 60
"""A larger number of values is not told from this one."""

MODEST_BYTES = 64 << 20
"""Number of bytes of all members of an archive that are never too many."""

MAX_RATIO = 4
"""Number of bytes of all members, at most, for each byte of a larger archive: torch.save compresses nothing,
and torch.load unpacks what is compressed, or what is there twice."""


class Stranger:
    """Stands for an object of another program's class; there is a subclass for each such class of a file.

    Attributes:
        title: module and name of the class that it stands for.
        held: arguments and state of the object, as the file holds them.
    """

    title = ""
    held: list[Any]

    def __new__(cls, *values: Any) -> Stranger:
        made = super().__new__(cls)
        made.held = list(values)
        return made

    def __init__(self, *values: Any) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        self.held.append(state)


class StrangeMapping:
    """Stands for a subclass of ``dict``; it makes plain dictionaries, whose items follow."""

    def __new__(cls, *values: Any) -> OrderedDict[Any, Any]:  # type: ignore[misc]
        first = values[0] if values else None
        return OrderedDict(first if isinstance(first, Mapping) else {})


class StrangeList:
    """Stands for a subclass of ``list``; it makes plain lists, whose items follow."""

    def __new__(cls, *values: Any) -> list[Any]:  # type: ignore[misc]
        return []


@dataclass
class Use:
    """What a pickle does with the objects of a class.

    Attributes:
        gets_keys: it sets items of some of them by key, as of a dictionary.
        gets_items: it appends to some of them, as to a list.
        gets_state: it sets the attributes of some of them.
        gets_slots: it sets them through a tuple, which torch does not do for dictionaries.
    """

    gets_keys: bool = False
    gets_items: bool = False
    gets_state: bool = False
    gets_slots: bool = False

    @property
    def stand_in(self) -> type | None:
        """The class to stand for it; ``None`` where torch could not load the objects with any."""
        if self.gets_keys:
            return None if self.gets_slots or self.gets_items else StrangeMapping
        if self.gets_items:
            return None if self.gets_state else StrangeList
        return Stranger


class ExcessiveCheckpoint(ValueError):
    """A file asks for more work or memory than a checkpoint of its size needs."""


@dataclass
class _Held:
    """A list, a mapping or a tuple on the simulated stack: how many values it stands for."""

    weight: int = 1
    is_tuple: bool = False

    def add(self, values: list[object]) -> None:
        self.weight = min(MAX_WEIGHT, self.weight + sum(map(_weigh, values)))


def _weigh(value: object) -> int:
    return value.weight if isinstance(value, _Held) else 1


@dataclass(frozen=True)
class _Class:
    """A class or function on the simulated stack."""

    name: tuple[str, str]


@dataclass
class _Made(_Held):
    """What a class or function made, on the simulated stack; it may have copied what it was given."""

    name: tuple[str, str] = ("", "")


def make_stand_ins(path: Path) -> list[tuple[Callable[..., Any], str]]:
    """``(stand-in, name in the file)`` for ``torch.serialization.safe_globals``, for the classes that a
    checkpoint names and that may stand in settings.

    Nothing is raised for a damaged file: torch tells what is wrong with it.

    Raises:
        ExcessiveCheckpoint: loading the file would take hours, or far more memory than it has bytes.
    """
    known = {item[1] for item in ALLOWED if isinstance(item, tuple)}
    try:
        uses = _find_uses(path)
    except ExcessiveCheckpoint:
        raise
    except Exception:  # a damaged or hostile pickle may raise anything here
        return []
    return [
        (type("StandIn", (kind,), {"title": f"{module}.{name}"}), f"{alias}.{name}")
        for (module, name), use in uses.items()
        if may_stand_in_settings(module, name) and (kind := use.stand_in) is not None
        for alias in {module, PYTHON_2.get(module, module)}
        if f"{alias}.{name}" not in known
    ]


def find_unloadable(path: Path) -> list[str]:
    """Names of the classes of a checkpoint that may stand in settings and that no stand-in can replace: their
    objects are lists or dictionaries with attributes of their own, which torch does not rebuild.

    Nothing is raised for a damaged file.
    """
    try:
        uses = _find_uses(path)
    except Exception:  # a damaged or hostile pickle may raise anything here
        return []
    return [
        f"{module}.{name}"
        for (module, name), use in uses.items()
        if may_stand_in_settings(module, name) and use.stand_in is None
    ]


def may_stand_in_settings(module: str, name: str) -> bool:
    """Whether ``name`` of ``module`` may be a class or a helper of an object among honest settings.

    The stand-in of a hostile function would be as harmless. But a file that names one is hostile, and the
    user should hear it.
    """
    root = module.partition(".")[0]
    root = PYTHON_2.get(root, root)
    if root == "builtins":
        return name in VALUE_BUILTINS or name.endswith(("Error", "Exception"))
    if root in sys.stdlib_module_names:
        return root in VALUE_MODULES
    if root == "torch":
        return _is_inside(module, TORCH_MODULES) and _is_class(name) and module != "torch.nn.parameter"
    if root == "numpy":
        return _is_inside(module, NUMPY_MODULES) or (module == "numpy" and name in NUMPY_TYPES)
    return root != "cmt_edge" or _is_class(name) or (module, name) == OWN_HELPER


def _is_inside(module: str, modules: tuple[str, ...]) -> bool:
    return any(module == outer or module.startswith(f"{outer}.") for outer in modules)


def _is_class(name: str) -> bool:
    """Whether ``name`` is written as classes are: in the project's and in torch's code, functions begin with
    a small letter."""
    return name.lstrip("_")[:1].isupper()


# --- reading a pickle without running it ----------------------------------------------------------


def _find_uses(path: Path) -> dict[tuple[str, str], Use]:
    simulation = _Simulation()
    with path.open("rb") as file:
        zipped = file.read(len(ZIP_START)) == ZIP_START
        file.seek(0)
        if not zipped:
            for _ in range(LEGACY_HEADERS):
                for _ in simulation.count(file):
                    pass
            return simulation.run(file)
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        size = sum(member.file_size for member in members)
        if size > max(MODEST_BYTES, MAX_RATIO * path.stat().st_size):
            raise ExcessiveCheckpoint(f"its members have {size} bytes, the file {path.stat().st_size}")
        for member in members:  # torch chooses one by the name of the first member, in small or large letters
            if member.filename.lower().rpartition("/")[2] == "data.pkl":
                with archive.open(member) as inner:
                    simulation.run(inner)
    return simulation.uses


@dataclass
class _Simulation:
    """A pickle machine that makes nothing: its stack holds what each value would be."""

    stack: list[object] = field(default_factory=list)
    memo: dict[object, object] = field(default_factory=dict)
    uses: dict[tuple[str, str], Use] = field(default_factory=dict)
    opcodes: int = 0
    work: int = 0

    def run(self, file: IO[bytes]) -> dict[tuple[str, str], Use]:
        """What the next pickle in ``file`` does with every class that it names."""
        self.stack, self.memo = [], {}
        for opcode, argument in self.count(file):
            step = getattr(self, f"do_{opcode.name.lower()}", None)
            if step is not None:
                step(argument)
            elif "PUT" in opcode.name:
                self.memo[argument] = self.stack[-1]
            elif "GET" in opcode.name:
                self.stack.append(self.memo[argument])
            else:
                self._do_other(opcode)
        return self.uses

    def count(self, file: IO[bytes]) -> Iterator[tuple[pickletools.OpcodeInfo, Any]]:
        """The opcodes of the next pickle in ``file`` with their arguments, if there are not too many."""
        for opcode, argument, _ in pickletools.genops(file):
            self.opcodes += 1
            if self.opcodes > MAX_OPCODES:
                raise ExcessiveCheckpoint(f"its pickles have more than {MAX_OPCODES} opcodes")
            yield opcode, argument

    def _spend(self, values: list[object]) -> None:
        """Count values of which keys are computed, or that are handed to a function."""
        self.work += sum(map(_weigh, values))
        if self.work > MAX_WORK:
            raise ExcessiveCheckpoint("its pickles hold the same values in millions of ways")

    def do_global(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        self.uses.setdefault((module, name), Use())
        self.stack.append(_Class((module, name)))

    def do_mark(self, _: object) -> None:
        self.stack.append(MARK)

    def do_reduce(self, _: object) -> None:
        given, made = self.stack.pop(), self.stack.pop()
        self._spend([given])
        self.stack.append(_Made(_weigh(given), name=made.name) if isinstance(made, _Class) else None)

    do_newobj = do_reduce

    def do_build(self, _: object) -> None:
        state = self.stack.pop()
        use = self._find_use()
        use.gets_state = True
        use.gets_slots = use.gets_slots or (isinstance(state, _Held) and state.is_tuple)

    def do_setitem(self, _: object) -> None:
        self._set_items([self.stack.pop(-2), self.stack.pop()])

    def do_setitems(self, _: object) -> None:
        self._set_items(self._pop_to_mark())

    def _set_items(self, items: list[object]) -> None:
        self._spend(items[::2])
        self._find_use().gets_keys = True
        self._add(items)

    def do_append(self, _: object) -> None:
        self._append_items([self.stack.pop()])

    def do_appends(self, _: object) -> None:
        self._append_items(self._pop_to_mark())

    def _append_items(self, items: list[object]) -> None:
        self._find_use().gets_items = True
        self._add(items)

    def _add(self, items: list[object]) -> None:
        """Put items into what lies on the stack."""
        held = self.stack[-1]
        if isinstance(held, _Held):
            held.add(items)

    def do_empty_list(self, _: object) -> None:
        self.stack.append(_Held())

    do_empty_dict = do_empty_list

    def do_list(self, _: object) -> None:
        self._make(self._pop_to_mark(), is_tuple=False)

    do_dict = do_list

    def do_tuple(self, _: object) -> None:
        self._make(self._pop_to_mark(), is_tuple=True)

    def do_tuple1(self, _: object) -> None:
        self._make([self.stack.pop()], is_tuple=True)

    def do_tuple2(self, _: object) -> None:
        self._make([self.stack.pop() for _ in range(2)], is_tuple=True)

    def do_tuple3(self, _: object) -> None:
        self._make([self.stack.pop() for _ in range(3)], is_tuple=True)

    def do_empty_tuple(self, _: object) -> None:
        self._make([], is_tuple=True)

    def _make(self, values: list[object], *, is_tuple: bool) -> None:
        made = _Held(is_tuple=is_tuple)
        made.add(values)
        self.stack.append(made)

    def _do_other(self, opcode: pickletools.OpcodeInfo) -> None:
        """Take off and put on as many values as the opcode's description says."""
        if pickletools.markobject in opcode.stack_before:
            before = opcode.stack_before.index(pickletools.markobject)
            self._pop_to_mark()
        else:
            before = len(opcode.stack_before)
        if before:
            del self.stack[-before:]
        self.stack += [None] * len(opcode.stack_after)

    def _pop_to_mark(self) -> list[object]:
        """What lies above the last mark, in order."""
        values = []
        while (value := self.stack.pop()) is not MARK:
            values.append(value)
        return values[::-1]

    def _find_use(self) -> Use:
        """The use of the class whose object lies on the stack; a use of nothing for another value."""
        top = self.stack[-1]
        return self.uses[top.name] if isinstance(top, _Made) else Use()


# --- what was left out ----------------------------------------------------------------------------


def find_strangers(content: Any) -> Iterator[tuple[tuple[str, ...], Stranger]]:
    """Every stand-in in a checkpoint's content, and the first keys on the way to it; not those inside
    another."""
    seen: set[int] = set()
    pending: list[tuple[tuple[str, ...], Any]] = [((), content)]
    while pending:
        way, held = pending.pop()
        if isinstance(held, Stranger):
            yield way, held
        elif isinstance(held, (Mapping, list, tuple)) and id(held) not in seen:
            seen.add(id(held))
            pending += list(_list_inner(way, held))[::-1]


def _list_inner(way: tuple[str, ...], held: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    """What may hold a stand-in in a mapping or a list, with the keys on the way to it."""
    kinds = (Stranger, Mapping, list, tuple)
    if not isinstance(held, Mapping):
        return ((way, value) for value in held if isinstance(value, kinds))
    is_long = len(way) >= MAX_SHOWN_WAY
    return (
        (way if is_long else (*way, str(key)), value)
        for key, value in held.items()
        if isinstance(value, kinds)
    )
