"""The kernels that TensorRT for RTX compiles when an engine is opened, kept for the next start.

An engine of TensorRT for RTX holds programs for kinds of GPUs, which its runtime compiles for the one that is
here. NVIDIA's *runtime cache* takes the results along to the next process. It is native code in effect, so it
is used as engines are: only if its key is the present one and this machine's user sealed it. Its own check
(release, GPU, driver) comes on top.

Source: TensorRT for RTX documentation, "Working with Runtime Cache".
"""

from __future__ import annotations

import hashlib
import threading
import warnings
from dataclasses import asdict, dataclass
from typing import Any

from ..bundle import Bundle
from ..bundle.sections import EngineKey
from ..cache import Cache, compute_digest
from ..errors import CacheWarning, OutputError
from ..files import find_cache_folder
from .bindings import Product
from .engine import EngineOptions, EngineTarget, is_sealed, make_engine_key, make_seal

FOLDER = "kernels"
"""Name of the folder in the cache."""
KERNELS = ".kernels"
"""Suffix of a file of kernels; the seal comes first in it."""
KEPT_ENGINES = 32
"""The number of engines whose kernels are kept."""
PRIVATE = 0o600
"""Permissions of a file of kernels: only the user who sealed it can use it."""
SEAL_LENGTH = 64
"""Characters of a seal."""


@dataclass(frozen=True)
class KernelStore:
    """Where the kernels of one engine on one device are kept.

    Attributes:
        engine: hash of the engine.
        key: the graph, versions and device.
    """

    engine: str
    key: EngineKey

    def read(self) -> bytes:
        """What an earlier process kept; empty where nothing is, or nothing that may be used."""
        found = self._open().read(self._name())
        if found is None:
            return b""
        seal, kernels = found[0][:SEAL_LENGTH], found[0][SEAL_LENGTH:]
        try:
            if is_sealed(self._describe(kernels), self.key, seal.decode("ascii", "replace")):
                return kernels
        except OutputError:  # there is no secret here, which is told when something is to be kept
            return b""
        _warn("the compiled kernels in the cache were not used: they are not as this machine wrote them")
        return b""

    def write(self, kernels: bytes) -> None:
        """Keep ``kernels``; where that is impossible, the next start compiles again."""
        try:
            seal = make_seal(self._describe(kernels), self.key)
            self._open().write(self._name(), (seal.encode() + kernels,), PRIVATE)
        except OutputError as exc:
            _warn(f"the compiled kernels could not be kept for the next start: {exc}")

    def _open(self) -> Cache:
        return Cache(find_cache_folder() / FOLDER, (KERNELS,), KEPT_ENGINES)

    def _name(self) -> str:
        return compute_digest({"engine": self.engine, "key": asdict(self.key)})

    def _describe(self, kernels: bytes) -> str:
        """What the seal covers besides the key; no engine is described so."""
        return f"kernels {self.engine} {hashlib.sha256(kernels).hexdigest()}"


class CompiledKernels:
    """The runtime cache of an opened engine, which all its execution contexts share.

    It must be made and used where the engine's device is the thread's current one.
    """

    def __init__(self, engine: Any, store: KernelStore) -> None:
        self._store = store
        self._lock = threading.Lock()
        jit_config = engine.create_runtime_config()
        runtime_cache = jit_config.create_runtime_cache()
        kept = store.read()
        self.is_from_cache = bool(kept) and _takes(runtime_cache, kept)
        """Whether the kernels of an earlier process are used."""
        self._known = kept if self.is_from_cache else b""
        """What the store holds already."""
        jit_config.set_runtime_cache(runtime_cache)
        self.config: Any = jit_config
        """What execution contexts are made with."""
        self._cache: Any = runtime_cache

    def keep(self) -> None:
        """Keep what was compiled until now, if anything is new."""
        runtime_cache = self._cache
        with self._lock:
            kernels = bytes(runtime_cache.serialize() or b"")
            if kernels and kernels != self._known:
                self._store.write(kernels)
                self._known = kernels


def _takes(runtime_cache: Any, kernels: bytes) -> bool:
    """Whether NVIDIA's runtime accepts what an earlier process kept; whatever it raises means that it does
    not."""
    try:
        return bool(runtime_cache.deserialize(kernels))
    except Exception:  # its bindings raise types of their own
        return False


def find_store(product: Product, bundle: Bundle, target: EngineTarget, plan: bytes) -> KernelStore | None:
    """Where the kernels of an engine are kept; ``None`` for a product that compiles nothing on opening."""
    if not product.compiles_on_opening:
        return None
    key = make_engine_key(bundle, target, EngineOptions())
    return KernelStore(hashlib.sha256(plan).hexdigest(), key)


def _warn(message: str) -> None:
    warnings.warn(message, CacheWarning, stacklevel=4)
