"""Every error of the project on one screen. Standard library only: it is the one module every room may
import.

An error says what is wrong, where, why, and the remedy; its ``exit_code`` is what a command ends with:
1 a verification or gate failed, 2 bad usage or input, 3 a runtime or device is missing, 4 internal failure.
"""

from __future__ import annotations

from collections.abc import Iterable


class CmtEdgeError(Exception):
    """Base of all errors raised on purpose; ``str()`` is one readable message."""

    exit_code = 4

    def __init__(
        self,
        what: str,
        *,
        where: object = None,
        why: object = None,
        remedy: str | None = None,
    ) -> None:
        self.what = what
        self.where = None if where is None else str(where)
        self.why = None if why is None else str(why)
        self.remedy = remedy
        super().__init__(what)

    def __str__(self) -> str:
        lines = [f"{self.where}: {self.what}" if self.where else self.what]
        lines += [f"  why: {self.why}"] if self.why else []
        lines += [f"  remedy: {self.remedy}"] if self.remedy else []
        return "\n".join(lines)


class GateError(CmtEdgeError):
    """A verification ran and its result is outside the tolerance."""

    exit_code = 1


class ParityError(GateError):
    """A step's output differs numerically from the PyTorch reference."""


class InputError(CmtEdgeError):
    """What the user gave cannot be used."""

    exit_code = 2


class UnknownNameError(InputError):
    """A model, format, precision or backend that does not exist."""

    def __init__(
        self,
        kind: str,
        name: str,
        close: Iterable[str],
        known: Iterable[str],
        where: object = None,
    ) -> None:
        close, known = list(close), list(known)
        remedy = f"did you mean {' or '.join(close)}?" if close else f"choose one of: {', '.join(known)}"
        super().__init__(
            f"unknown {kind} {name!r}",
            where=where,
            remedy=remedy,
        )


class WeightsError(InputError):
    """A checkpoint that cannot be read, is unsafe, or does not fit the model."""


class DownloadError(InputError):
    """Published weights could not be fetched or failed their check."""


class DataError(InputError):
    """A folder or archive of images that cannot be used."""


class ImageError(DataError):
    """One image that cannot be decoded, or that exceeds the caps."""


class BundleError(InputError):
    """A bundle with a missing, edited or extra member, or an unreadable manifest."""


class SignatureError(BundleError):
    """A bundle that is not signed, or not with the key that was asked for, or was changed after that."""

    exit_code = 1


class OutputError(InputError):
    """A place that cannot be written to."""


class RuntimeMissingError(CmtEdgeError):
    """A runtime, device or instruction set that the request needs is not here."""

    exit_code = 3


class ClusterError(CmtEdgeError):
    """A cluster that cannot go on: its workers end, a node is gone, or its memory is full."""

    exit_code = 3


class StepError(CmtEdgeError):
    """A step of the export failed inside a third-party library; ``what`` names the step."""


class CacheWarning(UserWarning):
    """A cache cannot be used, so the next run makes again what this one made."""
