"""The steps of an export in order: what ``--dry-run`` prints, and what a run keeps to.

Each phase of a run opens a :class:`Journal` over its steps and announces every step that it takes. A step
that is left out, added or taken out of turn is an error, so the printed plan and the run cannot drift apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from enum import Enum
from typing import Any

from cmt_edge.calib.data import GENERATED, SYNTHETIC
from cmt_edge.cmt.download import is_kept
from cmt_edge.cmt.weights import AS_BUILT
from cmt_edge.deploy import Bundle
from cmt_edge.deploy.bundle.sections import AUTO_PRECISIONS
from cmt_edge.deploy.escaping import escape_line
from cmt_edge.deploy.progress import Progress

from .config import ExportConfig
from .description import describe_export
from .steps import (
    OBSERVED_IMAGES,
    choose_images,
    count_synthetic,
    make_reference,
    match_evaluation,
    open_labelled,
    write_notes_on_checkpoint,
)


class Step(Enum):
    """A step of an export; its value is what is announced."""

    LOAD = "load the reference model"
    SYNTHESISE = "make {images} synthetic images"
    DECODE = "compare reduced with full decoding"
    FUSE = "fuse"
    TRACE = "export to ONNX"
    SIMPLIFY = "simplify"
    CALIBRATE = "calibrate on {images} images"

    COMPARE = "measure the answers of every candidate"
    RANK = "rank the groups by their sensitivity to int8"
    REFINE = "keep the most sensitive groups in float until the drop is allowed"
    TIME = "measure the latencies, interleaved"
    COMPILE = "compile every candidate"
    CHOOSE = "choose"

    OBSERVE = "observe {images} images"
    TYPE = "write the precision into the graph"
    FILES = "write the files for {format}"
    BUILD = "build the engine"
    VERIFY = "verify"
    MEASURE = "measure"
    WRITE = "write the bundle"

    def title(self, **figures: object) -> str:
        """What is announced, with the figures in it."""
        return self.value.format(**figures)


OPTIONAL = (Step.RANK, Step.REFINE)
"""Steps that a run may find unnecessary: int8 may pass as a whole, or the time may be up."""


def list_steps(config: ExportConfig) -> list[Step]:
    """Every step of an export in order."""
    return [
        *list_steps_to_prepare(config),
        *list_steps_to_choose(config),
        *list_steps_to_finish(config),
    ]


def list_steps_to_prepare(config: ExportConfig) -> Iterator[Step]:
    """Steps up to the simplified graph, and its int8 form where one is needed."""
    yield Step.LOAD
    if config.data == SYNTHETIC:
        yield Step.SYNTHESISE
    if config.decode == "reduced":
        yield Step.DECODE
    yield from (Step.FUSE, Step.TRACE, Step.SIMPLIFY)
    if config.quantizes:
        yield Step.CALIBRATE


def list_steps_to_choose(config: ExportConfig) -> Iterator[Step]:
    """Steps from which the precision is chosen; none where it was named."""
    if config.precision == "auto" and config.format == "rtx":
        yield Step.COMPILE
    elif config.precision == "auto":
        yield from (
            Step.COMPARE,
            Step.RANK,
            Step.REFINE,
            Step.TIME,
            Step.CHOOSE,
        )


def list_steps_to_finish(config: ExportConfig) -> Iterator[Step]:
    """Steps from the graph to the bundle."""
    if config.is_typed:
        if config.precision != "fp32":
            yield Step.OBSERVE
        yield Step.TYPE
    yield Step.FILES
    if config.has_engine and config.build:
        yield Step.BUILD
    yield Step.VERIFY
    if not config.is_typed:  # what another device runs is measured there
        yield Step.MEASURE
    yield Step.WRITE


class Journal:
    """Announces the steps of a run and holds it to its plan; a context manager."""

    def __init__(self, steps: Iterable[Step], progress: Progress) -> None:
        self._left, self._progress = list(steps), progress

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        missed = [step for step in self._left if step not in OPTIONAL]
        if kind is None and missed:
            raise RuntimeError(f"the run left out {', '.join(step.name for step in missed)}")

    def __contains__(self, step: Step) -> bool:
        """Whether a step is still to come."""
        return step in self._left

    @contextmanager
    def step(self, step: Step, **figures: object) -> Iterator[None]:
        """Take a step and announce it."""
        self.take(step)
        with self._progress.step(step.title(**figures)):
            yield

    def take(self, step: Step) -> None:
        """Take a step whose parts are announced elsewhere."""
        while self._left and self._left[0] is not step and self._left[0] in OPTIONAL:
            del self._left[0]
        if not self._left or self._left[0] is not step:
            planned = self._left[0].name if self._left else "nothing"
            raise RuntimeError(f"the run takes the step {step.name} where {planned} was planned")
        del self._left[0]


def describe_plan(config: ExportConfig) -> dict[str, Any]:
    """What an export would do, for ``--dry-run``: the weights are loaded, the classes are counted and matched
    with the labels and with the folders, and the images are chosen.

    Raises:
        WeightsError: the weights cannot be read, or do not fit.
        InputError: the labels are not one a class.
        DataError: the images that it names cannot be used.
    """
    images = _plan_images(config)
    plan: dict[str, Any] = {
        "bundle": " or ".join(map(str, config.targets)),
        "replaces": any(target.exists() for target in config.targets),
        **_describe_subject(config),
    }
    if config.data:
        plan["calibration" if config.quantizes else "ranges"] = images
    if config.eval_data:
        plan["evaluation"] = _count_evaluation(config)
    if config.precision == "auto":
        plan["allowed"] = _describe_limits(config)
        plan["candidates"] = [*AUTO_PRECISIONS[config.format], "int8 in part"]
    return plan | _describe_result(config) | {"steps": _list_titles(config, images["images"])}


def _describe_limits(config: ExportConfig) -> dict[str, Any]:
    """What ``auto`` must keep to."""
    return {
        "drop": config.allowed_drop,
        "latency_ms": config.latency_budget,
        "time_s": config.time_budget,
        "isa": config.isa,
    }


def _describe_result(config: ExportConfig) -> dict[str, Any]:
    """What the bundle takes and gives."""
    return {
        "input": [
            config.batch or "batch",
            3,
            config.img_size,
            config.img_size,
        ],
        "mean": list(config.preprocess.mean),
        "std": list(config.preprocess.std),
        "interpolation": config.preprocess.interpolation,
        "decode": config.decode,
        "classes": config.classes,
        "precision": config.precision,
        "format": config.format,
    }


def format_plan(plan: dict[str, Any]) -> str:
    """A plan of :func:`describe_plan` for a reader, one entry a line."""
    lines = [f"{key:<12} {escape_line(_format_entry(key, value))}" for key, value in plan.items()]
    return "\n".join([*lines, "dry run: nothing was written"])


def _format_entry(key: str, value: Any) -> str:
    """An entry of a plan in words."""
    if key in ENTRY_TEXTS:
        return ENTRY_TEXTS[key](value)
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _format_replaces(replaces: bool) -> str:
    return "a bundle that exists" if replaces else "nothing"


def _format_images(images: dict[str, Any]) -> str:
    """``"300 generated images"``, or ``"300 images from photos/train"``."""
    count, source = images["images"], images["source"]
    noun = "image" if count == 1 else "images"
    if source in (GENERATED, SYNTHETIC):
        return f"{count} {source} {noun}"
    return f"{count} {noun} from {source}"


def _format_evaluation(evaluation: dict[str, int]) -> str:
    return f"{evaluation['images']} images of {evaluation['classes']} classes"


def _format_allowed(allowed: dict[str, Any]) -> str:
    """The limits within which ``auto`` chooses; what has no limit is left out."""
    limits = [
        ("drop", "a drop of {:g} percentage points of top-1"),
        ("latency_ms", "a latency of {:g} ms"),
        ("time_s", "a search of {:g} s"),
        ("isa", "instructions up to {}"),
    ]
    given = [(name, text) for name, text in limits if allowed[name] is not None]
    return ", ".join(text.format(allowed[name]) for name, text in given)


def _format_input(shape: list[Any]) -> str:
    return " x ".join(map(str, shape))


ENTRY_TEXTS: dict[str, Callable[[Any], str]] = {
    "replaces": _format_replaces,
    "calibration": _format_images,
    "ranges": _format_images,
    "evaluation": _format_evaluation,
    "notes": "; ".join,
    "allowed": _format_allowed,
    "input": _format_input,
}
"""Name of an entry of a plan -> what puts it in words, where its value alone does not say it."""


def _plan_images(config: ExportConfig) -> dict[str, Any]:
    """The images that an export calibrates on or observes; synthetic ones are made from the model, which a
    plan does not load."""
    if config.data == SYNTHETIC:
        return {"source": SYNTHETIC, "images": count_synthetic(config)}
    data = choose_images(config)
    if data is None:
        return {"source": None, "images": OBSERVED_IMAGES}
    return {
        "source": data.source,
        "images": len(data),
        "fingerprint": data.fingerprint,
    }


def _describe_subject(config: ExportConfig) -> dict[str, Any]:
    """The weights and labels of the model that would be exported; its class folders are matched.

    Weights that would be downloaded are not: random ones stand in for them.
    """
    download = _find_download(config)
    opened = replace(config, weights="random") if download else config
    reference = make_reference(opened)
    manifest = describe_export(opened, reference)
    if config.eval_data:
        match_evaluation(config, Bundle(config.target, manifest))
    recorded = manifest.model.weights
    as_built = recorded.source == AS_BUILT
    found: dict[str, Any] = {"weights": AS_BUILT if as_built else config.weights}
    if download:
        found["download"] = download
    else:
        found["sha256"] = recorded.sha256
    if recorded.entry:
        found["entry"] = recorded.entry
    found["labels"] = f"{len(manifest.labels)} ({manifest.labels_source})"
    notes = write_notes_on_checkpoint(config, manifest, reference.loaded)
    return found | ({"notes": notes} if notes else {})


def _find_download(config: ExportConfig) -> str | None:
    """Address of the weights that a run would have to download."""
    spec = config.spec
    published = spec.pretrained
    if config.weights != "pretrained" or spec.built_with_weights or spec.published_state is not None:
        return None
    if published is None or published.resource or published.url is None or is_kept(published):
        return None
    return published.url


def _count_evaluation(config: ExportConfig) -> dict[str, int]:
    """The labelled images that an export is judged on."""
    labelled = open_labelled(config)
    found, limit = len(labelled.items), config.eval_limit
    count = found if limit is None else min(limit, found)
    return {"images": count, "classes": len(labelled.classes)}


def _list_titles(config: ExportConfig, images: int) -> list[str]:
    """What a run announces."""
    titles = []
    for step in list_steps(config):
        count = min(images, OBSERVED_IMAGES) if step is Step.OBSERVE else images
        titles.append(step.title(images=count, format=config.format))
    return titles
