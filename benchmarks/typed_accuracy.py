"""What the typed graphs of ``--format trt`` cost in accuracy, measured without a GPU.

    python benchmarks/typed_accuracy.py ../shared/data/cifar10.tar \
        --weights ../shared/weights/cmt_nano_cifar10.pt \\
        --golden ../shared/golden --photos ../shared/data/imagenet_sample

First table: ``cmt_nano`` on the CIFAR-10 test images. Second: ``cmt_xs`` with the golden weights
(``--golden``), logits on photographs against its own float32 graph, in standard deviations of the logits.
"rounded" runs every float16 tensor rounded to float16, as a GPU does; "as it is" is ONNX Runtime on the typed
file, which computes float16 in float32.
"""

from __future__ import annotations

import argparse
import runpy
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from cmt_edge.deploy import Bundle, Predictor, preprocess
from cmt_edge.deploy.images import ImageSet
from cmt_edge.deploy.measure.parity import verify
from cmt_edge.deploy.report import format_table
from cmt_edge.export import ExportConfig, run
from cmt_edge.export.to_onnx import run_graph
from cmt_edge.export.typed import round_graph

PRECISIONS = ("fp32", "fp16", "int8")
"""The typed graphs that are compared."""

PHOTOS = 64
"""The largest number of photographs that is read."""


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("archive", type=Path, help="holds train/CLASS/*.jpg and test/CLASS/*.jpg")
    p.add_argument("--weights", default="pretrained")
    p.add_argument("--golden", type=Path, help="folder of golden.py")
    p.add_argument("--photos", help="folder of photographs, to calibrate on and to compare on")
    args = p.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = [measure_top1_row(args, folder, precision) for precision in PRECISIONS]
        columns = [
            "cmt_nano, typed",
            "reference top-1 %",
            "top-1 %, rounded",
            "drop (95 % CI)",
            "agreement %",
            "top-1 %, as it is",
        ]
        print(format_table(columns, rows, markdown=True))
        if args.golden and args.photos:
            print()
            print(format_golden_table(args, folder))


def export(folder: str, model: str, precision: str, data: str | None, **settings: Any) -> Bundle:
    config = ExportConfig(
        model,
        "trt",
        precision,
        build=False,
        data=data if precision == "int8" else None,
        output=folder,
        max_drop=100.0,  # measured here, not gated
        atol=100.0,
        **settings,
    )
    return run(config)


def measure_top1_row(args: argparse.Namespace, folder: str, precision: str) -> list[str]:
    test = str(args.archive / "test")
    bundle = export(
        folder, "cmt_nano", precision, str(args.archive / "train"), weights=args.weights, eval_data=test
    )
    d = bundle.manifest.verification.data
    plain = verify(bundle, data=ImageSet(test), backend="onnxruntime", max_drop=100.0).data
    low, high = d.drop_ci
    return [
        precision,
        f"{d.reference_top1:.2f}",
        f"{d.top1:.2f}",
        f"{d.drop:+.2f} ({low:+.2f} to {high:+.2f})",
        f"{d.agreement:.2f}",
        f"{plain.top1:.2f}",
    ]


def format_golden_table(args: argparse.Namespace, folder: str) -> str:
    golden = runpy.run_path(str(args.golden / "golden.py"))
    path = Path(folder) / "golden.pt"
    torch.save({k: torch.from_numpy(np.array(v)) for k, v in golden["weights"]("cmt_xs").items()}, path)
    rows = measure_logit_rows(args, folder, str(path))
    columns = [
        "cmt_xs, golden weights",
        "operations",
        "largest activation",
        "finite",
        "largest diff, rounded",
        "mean",
        "top-1 agreement %",
        "largest diff, as it is",
    ]
    return format_table(columns, rows, markdown=True)


def measure_logit_rows(args: argparse.Namespace, folder: str, weights: str) -> list[list[str]]:
    rows, images, truth = [], None, None
    for precision in PRECISIONS:
        bundle = export(folder, "cmt_xs", precision, args.photos, weights=weights)
        if images is None:
            source = ImageSet(args.photos)
            images = np.stack(
                [preprocess(source.read(item), bundle.preprocess) for item in source.items[:PHOTOS]]
            )
            with Predictor.load(bundle, backend="onnxruntime", cache=False) as p:
                truth = p.logits(images)
        with Predictor.load(bundle, backend="onnxruntime", cache=False) as p:
            plain = p.logits(images)
        graph = run_graph(round_graph(onnx.load(bundle.file("model.onnx"))), "rounded")
        ours = np.concatenate([graph(images[i : i + 1])[0] for i in range(len(images))])
        deviation = truth.std(axis=1).mean()
        diff, typing = np.abs(ours - truth) / deviation, bundle.manifest.typing
        counts = " + ".join(f"{n} {p}" for p, n in sorted(typing.operations.items()))
        largest = f"{typing.observed.largest:.3g}" if typing.observed else "-"
        rows.append(
            [
                precision,
                counts,
                largest,
                "yes" if np.isfinite(ours).all() else "NO",
                f"{diff.max():.2g}",
                f"{diff.mean():.2g}",
                f"{100 * (ours.argmax(1) == truth.argmax(1)).mean():.1f}",
                f"{np.abs(plain - truth).max() / deviation:.2g}",
            ]
        )
    return rows


if __name__ == "__main__":
    main()
