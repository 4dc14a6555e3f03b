"""What decoding JPEG images at a part of their size changes and saves: grey levels, logits, top-1, time.

    python benchmarks/photographs.py ../shared/data [--natural FOLDER] [--weights FILE] [--count N] \
        [--bundle BUNDLE]

The folder holds ``imagenet_sample/*.JPEG`` and ``cifar10.tar``. ``--weights`` is a cmt_nano trained on
CIFAR-10. ``--natural`` is a folder of large photographs as a camera made them; Debian's package
mate-backgrounds has twelve: ``apt-get download mate-backgrounds && dpkg -x mate-backgrounds_*.deb x`` unpacks
them to ``x/usr/share/backgrounds/mate/nature``.

Tables for each of several gaps (how many times the size after resizing a reduced image has at least):

* pixels: the photographs as they are, for a model of 64 pixels, so that they are reduced; the same enlarged
  to 12 megapixels and to 1920 x 1080, for 224 pixels; the natural ones;
* answers: logits of cmt_nano (64 pixels) on the photographs, and on CIFAR-10 test images enlarged to 512
  pixels, beside what int8 changes on the same images; int8 is calibrated on training images of CIFAR-10;
* time: from encoded bytes to pixels, interleaved;
* with ``--bundle``: from encoded bytes to logits of this bundle, beside the model alone, with two threads.

It also counts for how many images cropping before resizing would give the same pixels.
"""

from __future__ import annotations

import argparse
import io
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from common import say
from PIL import Image

from cmt_edge.deploy import Predictor, Preprocess
from cmt_edge.deploy.decoding import decode_at_least
from cmt_edge.deploy.measure.host import describe_host, read_versions
from cmt_edge.deploy.preprocessing import compute_geometry, decode_pixels, make_least_size, normalise
from cmt_edge.deploy.report import format_table
from cmt_edge.export import ExportConfig, run

GAPS = (1.5, 2.0, 3.0, 4.0)
"""The gaps that are compared."""
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""ImageNet's, of values from 0 to 1."""
SMALL = Preprocess(64, 73, MEAN, STD)
"""A model of 64 pixels, for which photographs of 500 x 375 are large."""
USUAL = Preprocess(224, 256, MEAN, STD)
"""A model of 224 pixels."""
CROPS = (
    USUAL,
    replace(USUAL, short_side=248),
    replace(USUAL, short_side=236),
    Preprocess(192, 232, MEAN, STD),
)
"""Models whose crop is compared with cropping before resizing."""
CAMERA, SCREEN = (4000, 3000), (1920, 1080)
"""Width and height of a photograph of 12 megapixels, and of a frame of 1080p."""
ENLARGED_CIFAR = (512, 512)
"""Width and height to which the images of CIFAR-10 are enlarged."""
QUALITY = 90
"""Of the JPEG files that are written here."""
ROUNDS = 9
"""Turns of the tables of times."""
TIMED = 4
"""How many images of a set are timed."""
THREADS = 2
"""Of the model where its answers are timed."""


@dataclass(frozen=True)
class Photographs:
    """Encoded JPEG images, and the preprocessing of the model that they are for."""

    name: str
    files: list[bytes]
    spec: Preprocess


def main() -> None:
    p = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    p.add_argument("data", type=Path, metavar="FOLDER")
    p.add_argument("--natural", type=Path, help="folder of large photographs")
    p.add_argument("--weights", default="pretrained", help="checkpoint of cmt_nano, trained on CIFAR-10")
    p.add_argument("--count", type=int, default=1000, help="images of CIFAR-10 (default 1000)")
    p.add_argument("--bundle", type=Path, help="a bundle of a model that photographs are large for")
    args = p.parse_args()
    sample = [path.read_bytes() for path in sorted((args.data / "imagenet_sample").glob("*.JPEG"))]
    natural = [path.read_bytes() for path in sorted(args.natural.glob("*.jpg"))] if args.natural else []
    sets = [
        Photographs("photographs as they are, for 64 pixels", sample, SMALL),
        Photographs("enlarged to 4000 x 3000, for 224 pixels", enlarge(sample[:12], CAMERA), USUAL),
        Photographs("enlarged to 1920 x 1080, for 224 pixels", enlarge(sample[:12], SCREEN), USUAL),
    ]
    if natural:
        sets.append(Photographs("natural ones, for 224 pixels", natural, USUAL))
    print(f"\n{compare_pixels(sets)}\n", flush=True)
    print(f"\n{measure_times(sets[1:])}\n", flush=True)
    if args.bundle:
        print(f"\n{measure_answers(sets[1:], args.bundle)}\n", flush=True)
    print(f"\nCropping before resizing gives other pixels for {count_cropped(sample[:12])}.\n")
    archive = args.data / "cifar10.tar"
    cifar = enlarge(list(read_archive(archive, args.count)), ENLARGED_CIFAR)
    answers = [Photographs("photographs", sample, SMALL), Photographs("CIFAR-10, enlarged", cifar, SMALL)]
    print(f"\n{compare_answers(answers, args.weights, archive)}\n")
    host = describe_host()
    print(f"{host.cpu}, {host.cores} cores; {', '.join(f'{k} {v}' for k, v in read_versions().items())}")


def enlarge(files: Sequence[bytes], size: tuple[int, int]) -> list[bytes]:
    """The images as JPEG files of this width and height, portraits turned."""
    found = []
    for data in files:
        image = Image.open(io.BytesIO(data)).convert("RGB")
        width, height = size if image.width >= image.height else size[::-1]
        buffer = io.BytesIO()
        image.resize((width, height), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=QUALITY)
        found.append(buffer.getvalue())
    return found


def read_archive(path: Path, count: int) -> Iterator[bytes]:
    """``count`` test images of CIFAR-10, spread evenly over the archive."""
    with tarfile.open(path) as archive:
        members = [m for m in archive if m.isfile() and "/test/" in f"/{m.name}"]
        for number in np.linspace(0, len(members) - 1, count).astype(int):
            file = archive.extractfile(members[number])
            assert file is not None
            yield file.read()


def find_factor(data: bytes, spec: Preprocess) -> float:
    """How many times smaller an image is decoded."""
    decoded = decode_at_least(data, spec.exif, least=make_least_size(spec, data))
    return round(decoded.size[0] / decoded.image.width)


def compare_pixels(sets: Sequence[Photographs]) -> str:
    """Differences in grey levels between reduced and full decoding, after resizing and cropping."""
    rows = []
    for photographs in sets:
        full = [decode_pixels(data, photographs.spec).astype(int) for data in photographs.files]
        for gap in GAPS:
            spec = replace(photographs.spec, decode="reduced", reducing_gap=gap)
            factors = [find_factor(data, spec) for data in photographs.files]
            reduced = [i for i, factor in enumerate(factors) if factor > 1]
            name = [photographs.name, f"{gap:g}", f"{len(reduced)} of {len(factors)}"]
            if not reduced:
                rows.append([*name, "-", "-", "-", "-"])
                continue
            differences = [np.abs(decode_pixels(photographs.files[i], spec) - full[i]) for i in reduced]
            means = [d.mean() for d in differences]
            rows.append(
                [
                    *name,
                    f"{np.mean([factors[i] for i in reduced]):.1f}",
                    f"{np.mean(means):.2f}",
                    f"{max(means):.2f}",
                    f"{max(d.max() for d in differences)}",
                ]
            )
        say(f"pixels: {photographs.name}")
    head = ["images", "gap", "reduced", "by", "mean difference", "of the worst image", "largest"]
    return format_table(head, rows, markdown=True)


def count_cropped(files: Sequence[bytes]) -> str:
    """How many images become others where they are cropped before they are resized."""
    different = 0
    for data in files:
        image = Image.open(io.BytesIO(data)).convert("RGB")
        for spec in CROPS:
            expected = decode_pixels(data, spec)
            (width, height), box = compute_geometry(*image.size, spec, data)
            across, down = image.width / width, image.height / height
            part = (box[0] * across, box[1] * down, box[2] * across, box[3] * down)
            found = image.resize((spec.size, spec.size), Image.Resampling.BICUBIC, part)
            different += not np.array_equal(np.asarray(found), expected)
    return f"{different} of {len(files) * len(CROPS)} images"


def measure_times(sets: Sequence[Photographs]) -> str:
    """Median milliseconds from encoded bytes to pixels, interleaved."""
    rows = []
    for photographs in sets:
        specs = {"full": photographs.spec}
        specs |= {
            f"gap {gap:g}": replace(photographs.spec, decode="reduced", reducing_gap=gap) for gap in GAPS
        }
        times: dict[str, list[float]] = {name: [] for name in specs}
        for _ in range(ROUNDS):
            for data in photographs.files[:TIMED]:
                for name, spec in specs.items():
                    start = time.perf_counter()
                    decode_pixels(data, spec)
                    times[name].append(1e3 * (time.perf_counter() - start))
        medians = {name: np.median(values) for name, values in times.items()}
        rows.append(
            [photographs.name]
            + [f"{value:.1f} ({value / medians['full']:.2f})" for value in medians.values()]
        )
        say(f"times: {photographs.name}")
    return format_table(["ms an image (of full)", *specs], rows, markdown=True)


def measure_answers(sets: Sequence[Photographs], path: Path) -> str:
    """Median milliseconds from encoded bytes to logits, full and reduced, and of the model alone."""
    rows = []
    with Predictor.load(path, threads=THREADS) as predictor:
        spec = replace(predictor.spec, decode="full")
        less = replace(spec, decode="reduced", reducing_gap=2.0)
        for photographs in sets:
            batch = make_batch(photographs.files[:1], spec)

            def answer_to(data: bytes, how: Preprocess) -> None:
                predictor.logits(make_batch([data], how))

            ways = {
                "full": partial(answer_to, how=spec),
                "gap 2": partial(answer_to, how=less),
                "the model alone": lambda data, batch=batch: predictor.logits(batch),
            }
            times: dict[str, list[float]] = {name: [] for name in ways}
            for number in range(ROUNDS + 1):
                for data in photographs.files[:TIMED]:
                    for name, way in ways.items():
                        start = time.perf_counter()
                        way(data)
                        times[name] += [1e3 * (time.perf_counter() - start)] if number else []
            medians = [np.median(values) for values in times.values()]
            name = photographs.name.split(", for")[0]
            rows.append([name, *(f"{ms:.1f} ({ms / medians[0]:.2f})" for ms in medians)])
            say(f"answers' times: {photographs.name}")
    return format_table([f"{path.name}: ms to the logits (of full)", *ways], rows, markdown=True)


def compare_answers(sets: Sequence[Photographs], weights: str, archive: Path) -> str:
    """Logits of a trained model on reduced and on fully decoded images, beside those of int8, which is
    calibrated on training images of ``archive``."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        config = ExportConfig("cmt_nano", weights=weights, output=folder, format="openvino")
        precise = run(config)
        int8 = run(replace(config, precision="int8", data=str(archive / "train")))
        with Predictor.load(precise) as predictor, Predictor.load(int8) as smaller:
            for photographs in sets:
                own = replace(predictor.spec, decode="full")
                batch = make_batch(photographs.files, own)
                full = predictor.logits(batch)
                rows.append([photographs.name, "int8", *compare_logits(smaller.logits(batch), full)])
                for gap in GAPS:
                    spec = replace(own, decode="reduced", reducing_gap=gap)
                    found = predictor.logits(make_batch(photographs.files, spec))
                    rows.append([photographs.name, f"gap {gap:g}", *compare_logits(found, full)])
                say(f"answers: {photographs.name}")
    head = ["images", "what differs", "mean difference, sd of logits", "largest", "same top-1 %"]
    return format_table(head, rows, markdown=True)


def make_batch(files: Sequence[bytes], spec: Preprocess) -> np.ndarray:
    """The images as the model takes them, float32 ``(N, 3, S, S)``."""
    return normalise(np.stack([decode_pixels(data, spec) for data in files]), spec)


def compare_logits(found: np.ndarray, expected: np.ndarray) -> list[str]:
    """Mean and largest difference in standard deviations of the logits, and the same answers."""
    difference = np.abs(found - expected) / expected.std()
    same = 100 * (found.argmax(1) == expected.argmax(1)).mean()
    return [f"{difference.mean():.4f}", f"{difference.max():.3f}", f"{same:.1f}"]


if __name__ == "__main__":
    main()
