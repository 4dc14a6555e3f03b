"""The sections about a bundle's origin: files, steps, preprocessing, images, machine, commands."""

from __future__ import annotations

import shlex
from collections.abc import Iterator

from cmt_edge.startup import name_program

from ...bundle import GOLDEN, LOGITS, ONNX, Manifest
from ...bundle.sections import BATCH, CalibrationEntry, Host, WeightsEntry
from ...measure.memory import Memory
from ..bundle import describe_weights
from .elements import UNKNOWN, Markup, Table, join, make, make_code, make_facts, make_hash
from .subject import Subject

Row = list[str]
"""The cells of a row."""

NAMED_MEMBERS = {ONNX: "graph", GOLDEN: "golden images"}
"""Member of a bundle -> what the table of steps calls it."""
AS_BUILT = "as built"
"""What the manifest calls the weights that a factory of the user's gave its model."""


def write_steps(manifest: Manifest) -> Markup:
    """Each step from the weights to the bundle, with what proves it."""
    differences = (manifest.verification.steps or {}) if manifest.verification else {}
    weights = manifest.model.weights
    rows = [
        ["weights", _describe_origin(weights), UNKNOWN, make_hash(weights.sha256)],
        *(
            [name, "largest difference of the outputs from the reference", f"{largest:.1e}", UNKNOWN]
            for name, largest in differences.items()
        ),
        *_list_calibration_rows(manifest.calibration),
        *(
            [NAMED_MEMBERS[name], name, UNKNOWN, make_hash(entry.sha256)]
            for name, entry in manifest.files.items()
            if name in NAMED_MEMBERS
        ),
    ]
    header = ["step", "what", "differs by", "hash"]
    return Table("From the weights to the bundle", header, rows, is_numeric=False).write()


def _describe_origin(weights: WeightsEntry) -> str:
    text = describe_weights(weights).partition(": ")[2]
    if weights.fresh:
        text += f"; {len(weights.fresh)} weights hold initial values"
    return text + (f"; {len(weights.resized)} weights were resized" if weights.resized else "")


def _list_calibration_rows(entry: CalibrationEntry | None) -> list[Row]:
    if entry is None:
        return []
    images = f"{entry.images} images of {entry.source}"
    return [
        ["calibration images", images, UNKNOWN, make_hash(entry.fingerprint)],
        ["calibration recipe", _describe_recipe(entry), UNKNOWN, make_hash(entry.recipe)],
    ]


def _describe_recipe(entry: CalibrationEntry) -> str:
    kept = f"float groups: {', '.join(entry.keep_float)}" if entry.keep_float else "every group in int8"
    return kept + ("; taken from the cache" if entry.cached else "")


def write_files(subject: Subject) -> Markup:
    """Every member with its size and hash, and what a process needs that opens them."""
    manifest, measured = subject.manifest, subject.measured
    hashed = {name: (entry.size, make_hash(entry.sha256)) for name, entry in manifest.files.items()}
    files: list[tuple[str, int, str]] = [(name, *proof) for name, proof in hashed.items()]
    files += [(name, size, "written with this page") for name, size in subject.unlisted.items()]
    rows = [[name, f"{size:,}", proof] for name, size, proof in sorted(files, key=lambda file: -file[1])]
    total = f"{subject.size_bytes / 1e6:.2f} MB in {len(files)} files"
    model = manifest.model
    macs = UNKNOWN if model.macs is None else f"{model.macs / 1e9:.3f} G"
    facts = [
        ("size", total),
        ("parameters", f"{model.params / 1e6:.2f} M"),
        ("multiply-accumulates of an image", macs),
        ("memory of a process that opens it", _describe_memory(measured.memory if measured else None)),
    ]
    table = Table("Files of the bundle, without its manifest", ["file", "bytes", "SHA-256"], rows, False)
    return join([make_facts(facts), table.write()])


def _describe_memory(memory: Memory | None) -> str:
    if memory is None:
        return f"not measured; {name_program('bench')} --memory does"
    return (
        f"{memory.peak / 1e6:.0f} MB at most, {memory.kept / 1e6:.0f} MB after the first answer, the runtime"
        " and Python included"
    )


def write_model(manifest: Manifest) -> Markup:
    """The model, its input and its outputs."""
    model = manifest.model
    tensors = [("input", manifest.input), *(("output", output) for output in manifest.outputs)]
    described = [
        (f"{role} {tensor.name}", f"{tensor.dtype} {_format_shape(tensor.shape)}") for role, tensor in tensors
    ]
    facts = [
        ("model", f"{model.name} ({model.family})"),
        ("head", model.head),
        *([("classes", f"{model.num_classes}, names: {manifest.labels_source}")] if manifest.labels else []),
        *described,
        ("ONNX opset", str(model.opset)),
    ]
    return make_facts(facts)


def _format_shape(shape: tuple[int | str, ...]) -> str:
    return " x ".join(map(str, shape))


def write_preprocessing(manifest: Manifest) -> Markup:
    """How an image becomes the model's input."""
    spec = manifest.preprocess
    resize = f"to {spec.size} x {spec.size} pixels, whatever the aspect ratio"
    if spec.short_side is not None:
        resize = f"short side to {spec.short_side} pixels, then the centre {spec.size} x {spec.size}"
    reduced = f", at least {spec.reducing_gap:g} times the size that is needed"
    facts = [
        ("EXIF orientation", spec.exif),
        ("decoding", spec.decode + (reduced if spec.decode == "reduced" else "")),
        ("resizing", f"{resize} ({spec.interpolation})"),
        ("mean", _format_numbers(spec.mean)),
        ("standard deviation", _format_numbers(spec.std)),
        ("layout", "RGB, values 0 to 1 before the mean is taken off, channels first"),
    ]
    return make_facts(facts)


def _format_numbers(numbers: tuple[float, ...]) -> str:
    return ", ".join(f"{number:.7g}" for number in numbers)


def write_images(manifest: Manifest) -> Markup:
    """What an int8 graph was calibrated on, or a float16 one observed on."""
    entry = manifest.calibration
    observed = manifest.typing.observed if manifest.typing else None
    if entry is None and observed is None:
        return make("p", "This precision needs no calibration images.")
    facts: list[tuple[str, str]] = []
    if entry:
        facts += [("calibrated on", f"{entry.images} images of {entry.source}")]
        facts += [("recipe", _describe_recipe(entry))]
        if made := entry.synthesis:
            facts += [("synthesis", f"{made.steps} of {made.steps_asked} steps, seed {made.seed}")]
    if observed:
        facts += [("ranges observed on", f"{observed.images} images of {observed.source}")]
        facts += [("largest value", f"{observed.largest:.4g}; float16 holds 65504")]
    return make_facts(facts)


def write_environment(subject: Subject) -> Markup:
    """The machine and the versions of the export, and of the measurement where that was another."""
    manifest, speed = subject.manifest, subject.speed
    parts = [_write_machine("Export", manifest.host, manifest.versions)]
    if speed and (speed.host, speed.versions) != (manifest.host, manifest.versions):
        parts.append(_write_machine("Measurement", speed.host, speed.versions))
    return join(parts)


def _write_machine(title: str, host: Host | None, versions: dict[str, str]) -> Markup:
    facts = list(_list_host_facts(host)) if host else []
    listed = ", ".join(f"{name} {version}" for name, version in versions.items())
    facts += [("versions", listed)] if listed else []
    return join([make("h3", title), make_facts(facts)]) if facts else Markup()


def _list_host_facts(host: Host) -> Iterator[tuple[str, str]]:
    yield "CPU", f"{host.cpu}, {host.cores or 'unknown'} cores"
    yield "instruction sets", ", ".join(host.flags) or "none of note"
    yield "system", f"{host.system}, {host.machine}"
    yield "Python", host.python
    if host.mhz:
        yield "clock", f"{host.mhz} MHz"
    if host.governor:
        yield "frequency governor", host.governor
    if host.temperature_mc:
        yield "temperature", f"{host.temperature_mc} thousandths of a degree Celsius"


def write_commands(subject: Subject) -> Markup:
    """How to make the bundle again, to check it and to measure it."""
    path = shlex.quote(subject.path)
    manifest = subject.manifest
    verify, bench = f"{name_program('verify')} {path}", f"{name_program('bench')} {path}"
    lines = [make_export_command(manifest), verify, bench]
    if manifest.model.head == LOGITS:
        lines.insert(2, f"{verify} --data LABELLED_IMAGES")
        lines.append(f"{name_program('predict')} {path} IMAGE")
    note = (
        "The first command is written from what the bundle records: of files and folders it knows the names"
        " but not the places, and words in capitals stand for your own. Settings that the bundle does not"
        " record, such as the class names' file, are missing."
    )
    return join([make_code(lines), make("p", note, class_="soft")])


def make_export_command(manifest: Manifest) -> str:
    """The export that makes a bundle like this one, as far as its manifest knows."""
    return " ".join([name_program("export"), *map(shlex.quote, _list_export_words(manifest))])


def _list_export_words(manifest: Manifest) -> Iterator[str]:
    model, spec = manifest.model, manifest.preprocess
    batch = manifest.input.shape[0]
    yield from ("--model", model.name)
    if model.weights.source != AS_BUILT:
        yield from ("--weights", model.weights.source)
    yield from ("--format", manifest.format, "--precision", manifest.precision)
    yield from ("--imgsz", str(model.img_size), "--batch", "0" if batch == BATCH else str(batch))
    if model.head != LOGITS:
        yield from ("--head", model.head)
    else:
        yield from ("--num-classes", str(model.num_classes))
    if model.weights.seed:
        yield from ("--seed", str(model.weights.seed))
    yield f"--mean={_join_numbers(spec.mean)}"
    yield f"--std={_join_numbers(spec.std)}"
    yield f"--crop-ratio={spec.size / spec.short_side if spec.short_side else 0:.9g}"
    if spec.decode != "full":
        yield from ("--decode", spec.decode)
    yield from _list_data_words(manifest)


def _list_data_words(manifest: Manifest) -> Iterator[str]:
    """The flags about images."""
    entry = manifest.calibration
    observed = manifest.typing.observed if manifest.typing else None
    if entry:
        yield from ("--data", entry.source, "--calib-size", str(entry.images))
        if entry.keep_float:
            yield from ("--keep-float", ",".join(entry.keep_float))
    elif observed:
        yield from ("--data", observed.source)
    data = manifest.verification.data if manifest.verification else None
    if data:
        yield from ("--eval-data", "LABELLED_IMAGES", "--max-drop", f"{data.max_drop:g}")


def _join_numbers(numbers: tuple[float, ...]) -> str:
    return ",".join(f"{number:.7g}" for number in numbers)
