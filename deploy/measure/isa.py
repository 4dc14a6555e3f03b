"""Instruction sets of edge boxes, to which a measurement may be limited (``--isa``)."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import RuntimeMissingError
from .host import describe_host


@dataclass(frozen=True)
class Isa:
    """A limit.

    Attributes:
        switch: its name in the runtime.
        flag: the flag that this machine's CPU needs to run it.
        beyond: parts of the names of kernels that use more than the limit allows.
        int8: whether it has instructions for int8 products.
        like: the processors that it stands for.
    """

    switch: str
    flag: str
    beyond: tuple[str, ...]
    int8: bool
    like: str


ISAS = {
    "avx2": Isa(
        switch="AVX2",
        flag="avx2",
        beyond=("avx512", "amx", "vnni"),
        int8=False,
        like="Intel Core before 2021, AMD before Zen 4",
    ),
    "avx2_vnni": Isa(
        switch="AVX2_VNNI",
        flag="avx_vnni",
        beyond=("avx512", "amx"),
        int8=True,
        like="Intel N100, Core from the 12th generation on",
    ),
    "avx512_vnni": Isa(
        switch="AVX512_CORE_VNNI",
        flag="avx512_vnni",
        beyond=("amx",),
        int8=True,
        like="Intel Core of the 10th and 11th generation, Xeon before 2023",
    ),
}
"""Choice of ``--isa`` -> its limit."""

INT8_FLAGS = {"avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm"}
"""CPU flags of instructions that multiply and add int8 values."""


def has_int8_hardware(isa: str | None) -> bool:
    """Whether this CPU, limited to ``isa``, has instructions that multiply and add int8 values."""
    if isa:
        return ISAS[isa].int8
    return bool(INT8_FLAGS & set(describe_host().flags))


def require_isa(isa: str) -> None:
    """Raise :class:`RuntimeMissingError` unless this CPU has the instructions of ``isa`` itself."""
    host = describe_host()
    if ISAS[isa].flag not in host.flags:
        raise RuntimeMissingError(
            f"this processor has no {isa}, so it cannot be measured here",
            why=host.cpu,
            remedy="choose another --isa, or leave it out",
        )
