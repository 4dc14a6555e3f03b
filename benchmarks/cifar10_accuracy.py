"""Top-1 and agreement of cmt_nano on CIFAR-10 test images, by runtime and precision, and what calibrating on
what costs.

    python benchmarks/cifar10_accuracy.py ../shared/data/cifar10.tar \
        --weights ../shared/weights/cmt_nano_cifar10.pt

The archive holds train/CLASS/*.jpg and test/CLASS/*.jpg. Without --weights the embedded weights are used.
--only synthetic --seed 1 measures one of the rows again with other images.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from cmt_edge.deploy.report import format_table
from cmt_edge.export import ExportConfig, run

COLUMNS = [
    "bundle",
    "calibrated on",
    "reference top-1 %",
    "top-1 %",
    "drop (95 % CI)",
    "agreement %",
    "mean logit diff",
]
"""Heads of the table."""


def make_noise_images(folder: Path, seed: int, count: int = 300) -> str:
    """Gaussian noise around mid-grey: the bad habit to compare with."""
    rng = np.random.default_rng(seed)
    folder.mkdir()
    for i in range(count):
        values = np.clip(rng.normal(120, 60, (64, 64, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(values).save(folder / f"{i:03}.png")
    return str(folder)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("archive", type=Path)
    p.add_argument("--weights", default="pretrained")
    p.add_argument("--only", help="only the rows calibrated on this: train, generated, synthetic or noise")
    p.add_argument("--seed", type=int, default=0, help="of the choice or making of calibration images")
    args = p.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        variants = [
            ("onnx", "fp32", None),
            ("openvino", "fp32", None),
            ("openvino", "bf16", None),
            ("onnx", "int8", str(args.archive / "train")),
            ("openvino", "int8", str(args.archive / "train")),
            ("openvino", "int8", "generated"),
            ("openvino", "int8", "synthetic"),
            ("openvino", "int8", make_noise_images(Path(folder) / "noise", args.seed)),
        ]
        rows = [
            measure_row(args, folder, *variant)
            for variant in variants
            if args.only in (None, Path(variant[2] or "").name)
        ]
    print(format_table(COLUMNS, rows, markdown=True))


def measure_row(
    args: argparse.Namespace, folder: str, form: str, precision: str, data: str | None
) -> list[str]:
    config = ExportConfig(
        "cmt_nano",
        form,
        precision,
        weights=args.weights,
        data=data,
        eval_data=str(args.archive / "test"),
        output=folder,
        seed=args.seed,
        max_drop=100.0,  # measured here, not gated
        atol=100.0,
    )
    bundle = run(config)
    d = bundle.manifest.verification.data
    images = "-" if data is None else f"{bundle.manifest.calibration.images} {Path(data).name} images"
    low, high = d.drop_ci
    return [
        f"{precision} {form}",
        images,
        f"{d.reference_top1:.2f}",
        f"{d.top1:.2f}",
        f"{d.drop:+.2f} ({low:+.2f} to {high:+.2f})",
        f"{d.agreement:.2f}",
        f"{d.logit_mean_diff:.2g}",
    ]


if __name__ == "__main__":
    main()
