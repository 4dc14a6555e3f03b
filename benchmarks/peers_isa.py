"""``peers.py --isa``: OpenVINO limited to the instructions of an older CPU, as a stand-in for one.

The limit is that of ``cmt-export --isa`` (:mod:`cmt_edge.deploy.measure.isa`), which only OpenVINO's kernels
keep to: ONNX Runtime and XNNPACK ask the CPU, so their rows are refused. It is checked by the names of the
kernels that ran.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping

from cmt_edge.deploy.measure.child import OWN_CHOICE, SWITCHES
from cmt_edge.deploy.measure.isa import ISAS, require_isa

LIMITED_ROWS = (
    "ov_fp32",
    "nncf_f32",
    "ov_frontend",
    "nncf_frontend",
    "nncf_module",
    "ours_fp32",
    "ours_int8",
)
"""The rows that OpenVINO runs in float32 and int8. No limit has bfloat16: others would repeat these."""


def set_limit(isa: str) -> None:
    """Set the runtime's switches for this process and its children, before either loads the runtime.

    Raises:
        RuntimeMissingError: this CPU lacks the instructions.
    """
    require_isa(isa)
    os.environ.update(dict.fromkeys(SWITCHES, ISAS[isa].switch))


def find_beyond(kernels: Iterable[str], isa: str) -> list[str]:
    """The kernels that use more than the limit allows."""
    return sorted(name for name in kernels if any(part in name for part in ISAS[isa].beyond))


def describe_unlimited(kernels: Mapping[str, float]) -> str:
    """A remark on the kernels that ask the CPU themselves, with their share of the time; empty where there
    are none."""
    share = sum(spent for name, spent in kernels.items() if OWN_CHOICE in name)
    if not share:
        return ""
    return f"{100 * share:.0f} % of the time went to kernels (MLAS) that may have used newer instructions"
