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

TUPLE = object()
"""Stands on the simulated stack for any tuple."""


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


@dataclass(frozen=True)
class _Class:
    """A class or function on the simulated stack."""

    name: tuple[str, str]


@dataclass(frozen=True)
class _Made:
    """What a class or function made, on the simulated stack."""

    name: tuple[str, str]


def make_stand_ins(path: Path) -> list[tuple[Callable[..., Any], str]]:
    """``(stand-in, name in the file)`` for ``torch.serialization.safe_globals``, for the classes that a
    checkpoint names and that may stand in settings.

    Nothing is raised for a damaged file: torch tells what is wrong with it.
    """
    known = {item[1] for item in ALLOWED if isinstance(item, tuple)}
    try:
        uses = _find_uses(path)
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
    with path.open("rb") as file:
        zipped = file.read(len(ZIP_START)) == ZIP_START
        file.seek(0)
        if not zipped:
            for _ in range(LEGACY_HEADERS):
                for _ in pickletools.genops(file):
                    pass
            return _Simulation().run(file)
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        inner = next(name for name in names if name.rpartition("/")[2] == "data.pkl")
        with archive.open(inner) as file:
            return _Simulation().run(file)


@dataclass
class _Simulation:
    """A pickle machine that makes nothing: its stack holds what each value would be."""

    stack: list[object] = field(default_factory=list)
    memo: dict[object, object] = field(default_factory=dict)
    uses: dict[tuple[str, str], Use] = field(default_factory=dict)

    def run(self, file: IO[bytes]) -> dict[tuple[str, str], Use]:
        """What the next pickle in ``file`` does with every class that it names."""
        for opcode, argument, _ in pickletools.genops(file):
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

    def do_global(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        self.uses.setdefault((module, name), Use())
        self.stack.append(_Class((module, name)))

    def do_mark(self, _: object) -> None:
        self.stack.append(MARK)

    def do_reduce(self, _: object) -> None:
        self.stack.pop()
        made = self.stack.pop()
        self.stack.append(_Made(made.name) if isinstance(made, _Class) else None)

    do_newobj = do_reduce

    def do_build(self, _: object) -> None:
        state = self.stack.pop()
        use = self._find_use()
        use.gets_state = True
        use.gets_slots = use.gets_slots or state is TUPLE

    def do_setitem(self, _: object) -> None:
        del self.stack[-2:]
        self._find_use().gets_keys = True

    def do_setitems(self, _: object) -> None:
        self._pop_to_mark()
        self._find_use().gets_keys = True

    def do_append(self, _: object) -> None:
        self.stack.pop()
        self._find_use().gets_items = True

    def do_appends(self, _: object) -> None:
        self._pop_to_mark()
        self._find_use().gets_items = True

    def do_tuple(self, _: object) -> None:
        self._pop_to_mark()
        self.stack.append(TUPLE)

    def _do_other(self, opcode: pickletools.OpcodeInfo) -> None:
        """Take off and put on as many values as the opcode's description says."""
        if pickletools.markobject in opcode.stack_before:
            before = opcode.stack_before.index(pickletools.markobject)
            self._pop_to_mark()
        else:
            before = len(opcode.stack_before)
        if before:
            del self.stack[-before:]
        made = TUPLE if opcode.name.startswith("TUPLE") else None
        self.stack += [made] * len(opcode.stack_after)

    def _pop_to_mark(self) -> None:
        while self.stack.pop() is not MARK:
            pass

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
