"""SHA-256 of ``model.onnx`` for each model, format and precision: does a change of the code change graphs?

    python scripts/model_hashes.py [MODEL ...] [--output FILE.json] [--before FILE.json]

Weights are random with a fixed seed, and int8 is calibrated on four generated images. With ``--before`` the
exit code is 1 if a hash differs from that of an earlier run. Without names, small models of each family are
taken; CMT-S and larger take minutes each. The cache is not used.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from cmt_edge import ExportConfig, export

MODELS = ("cmt_nano", "cmt_ti", "cmt_xs", "cvt_13", "convit_tiny", "mvitv2_t", "xformer_reading")
"""Models that are exported unless others are named."""
VARIANTS = (
    ("onnx", "fp32"),
    ("onnx", "int8"),
    ("trt", "fp32"),
    ("trt", "fp16"),
    ("trt", "int8"),
    ("openvino", "int8"),
)
"""Pairs of format and precision."""
IMAGES = 4
"""The number of generated images that calibrate."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("models", nargs="*", metavar="MODEL")
    parser.add_argument("--output", type=Path, help="write the hashes there, as JSON")
    parser.add_argument("--before", type=Path, help="hashes of an earlier run to compare with")
    args = parser.parse_args(argv)
    before = json.loads(args.before.read_text()) if args.before else {}
    found: dict[str, str] = {}
    for model in args.models or MODELS:
        for model_format, precision in VARIANTS:
            name = f"{model} {model_format} {precision}"
            found[name] = hash_graph(model, model_format, precision)
            print(name, found[name][:16], compare(found[name], before.get(name)), flush=True)
    if args.output:
        args.output.write_text(json.dumps(found, indent=1) + "\n")
    return int(any(before.get(name, value) != value for name, value in found.items()))


def hash_graph(model: str, model_format: str, precision: str) -> str:
    """Hex SHA-256 of the graph of one export."""
    images = {} if precision == "fp32" else {"data": "generated", "calib_size": IMAGES}
    with tempfile.TemporaryDirectory() as folder:
        config = ExportConfig(
            model,
            weights="random",
            format=model_format,
            precision=precision,
            output=folder,
            atol=1e9,  # random weights: the graph counts here, not its accuracy
            build=model_format != "trt",
            cache=False,
            **images,
        )
        return export(config).manifest.files["model.onnx"].sha256


def compare(now: str, before: str | None) -> str:
    """One word about an earlier hash."""
    if before is None:
        return ""
    return "equal" if now == before else "DIFFERS"


if __name__ == "__main__":
    sys.exit(main())
