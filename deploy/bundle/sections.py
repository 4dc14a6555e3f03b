"""The sections of a bundle's manifest, and the results of measurements that it records.

``docs/bundle.md`` describes every entry. ``manifest.json`` holds the keys in the order of the fields.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from .record import OMITTED, Between, Matches

LOGITS = "logits"
"""Name of a classifier's output, and of its head; feature maps are called ``stage1`` and so on."""
PROBABILITIES = "probabilities"
"""Kind of an output whose values are the classes' probabilities and sum to 1, as after a softmax."""
SCORES = "scores"
"""Kind of an output that gives each class a probability of its own, as after a sigmoid."""
MAX_TOTAL = 8 << 30
"""The largest size of all files of a bundle together, bytes."""
LEAST_SHARE = 0.005
"""A precision with a smaller share than this is left out of :meth:`ExecutedPrecision.summary`."""

Count = Annotated[int, Between(0)]
"""A number of things; none is possible."""
Size = Annotated[int, Between(1)]
"""A number of things of which there is at least one."""
Sha256 = Annotated[str, Matches("[0-9a-f]{64}", "64 hexadecimal digits")]
"""A SHA-256 as text."""
OutputKind = Annotated[
    str,
    Matches(f"{PROBABILITIES}|{SCORES}", f"{PROBABILITIES!r} or {SCORES!r}"),
]
"""What the values of an output are, where they are no logits."""
Duration = Annotated[float, Between(0)]
"""Milliseconds of a measurement."""
Difference = Annotated[float, Between(0)]
"""The size of a difference of outputs, or what is allowed of it."""
Share = Annotated[float, Between(0, 1.001)]
"""A part of a whole; sums of shares may end a rounding above 1."""
Percent = Annotated[float, Between(0, 100.1)]
"""A share in percent."""


@dataclass(frozen=True)
class FileEntry:
    """A file of the bundle: its size in bytes and its hash."""

    size: Annotated[int, Between(0, MAX_TOTAL)]
    sha256: Sha256


@dataclass(frozen=True, kw_only=True)
class WeightsEntry:
    """Where the model's weights came from.

    Attributes:
        source: ``"pretrained"``, ``"random"``, ``"as built"`` (a user's factory), or the file name of a
            checkpoint.
        sha256: over names, types, shapes and values of the weights.
        seed: of random and fresh weights.
        ema: whether the averaged weights of the checkpoint were taken.
        fresh: keys that were left at their initial values.
        resized: keys that were interpolated to the model's resolution.
        entry: where in the checkpoint they were, e.g. ``"state_dict_ema"``; ``None`` where they did not come
            from a file of the user's.
    """

    source: str
    sha256: Sha256
    seed: int
    ema: bool
    fresh: tuple[str, ...]
    resized: tuple[str, ...]
    entry: str | None = field(default=None, metadata=OMITTED)


@dataclass(frozen=True, kw_only=True)
class ModelEntry:
    """The model that was exported.

    Attributes:
        provider: entry point that can rebuild the PyTorch model.
        name: what the provider calls the model.
        family: architecture.
        img_size: height and width of the input in pixels.
        num_classes: number of logits; a single one has two labels.
        head: ``"logits"`` or ``"features"``.
        params: number of parameters.
        macs: multiply-accumulates of one image; ``None`` where they could not be counted.
        opset: ONNX opset of ``model.onnx``.
        weights: where the weights came from.
    """

    provider: str
    name: str
    family: str
    img_size: Size
    num_classes: Count
    head: str
    params: Count
    macs: Count | None
    opset: Size
    weights: WeightsEntry


@dataclass(frozen=True, kw_only=True)
class TensorEntry:
    """An input or output of the graph; ``"batch"`` stands in ``shape`` where the batch size is dynamic.

    ``kind`` is :data:`PROBABILITIES` or :data:`SCORES` of an output that is no logits any more, and ``None``
    of any other.
    """

    name: str
    shape: tuple[Size | str, ...]
    dtype: str
    kind: OutputKind | None = field(default=None, metadata=OMITTED)


@dataclass(frozen=True, kw_only=True)
class RuntimeEntry:
    """The runtime that the bundle was verified with; ``version`` is ``None`` where it has not run yet."""

    backend: str
    version: str | None


@dataclass(frozen=True, kw_only=True)
class SynthesisEntry:
    """How synthetic images were made.

    Attributes:
        seed: of the images that the optimisation started from.
        steps, steps_asked: number of optimisation steps, done and planned.
        loss_before, loss_after: distance of the batch statistics from the model's.
        stopped_early: whether the time was up before ``steps_asked``.
        cached: whether the images were taken from the cache.
    """

    seed: int
    steps: Count
    steps_asked: Count
    loss_before: float
    loss_after: float
    stopped_early: bool
    cached: bool


@dataclass(frozen=True, kw_only=True)
class ImagesEntry:
    """Calibration images.

    Attributes:
        source: what the user gave; of a folder only the last two parts.
        images: number of images.
        fingerprint: hash over the contents of the images.
        synthesis: how they were made, of synthetic images only.
    """

    source: str
    images: Count
    fingerprint: str
    synthesis: SynthesisEntry | None = field(default=None, metadata=OMITTED)


@dataclass(frozen=True, kw_only=True)
class CalibrationEntry(ImagesEntry):
    """What an int8 graph was calibrated on, and how.

    Attributes:
        recipe: hash of all choices of the quantization.
        cached: whether the calibrated graph was taken from the cache.
        keep_float: groups of operations that stay in float.
    """

    recipe: str
    cached: bool
    keep_float: tuple[str, ...]


@dataclass(frozen=True)
class Island:
    """An operation that stays float32 in a float16 graph.

    Attributes:
        node: name of the operation in the graph.
        op: its ONNX type.
        reason: readable.
        observed: the largest absolute value that decided it.
    """

    node: str
    op: str
    reason: str
    observed: float


@dataclass(frozen=True, kw_only=True)
class ObservedEntry:
    """The images that activations were observed on, and the ``largest`` absolute value of any tensor."""

    source: str
    images: Count
    largest: float
    synthesis: SynthesisEntry | None = field(default=None, metadata=OMITTED)


@dataclass(frozen=True, kw_only=True)
class TypingEntry:
    """The precision that was written into the graph.

    Attributes:
        operations: precision -> number of operations that compute in it.
        islands: operations that stay float32.
        observed: what the ranges were observed on; ``None`` where none were needed.
    """

    operations: dict[str, Count]
    islands: tuple[Island, ...]
    observed: ObservedEntry | None


@dataclass(frozen=True)
class RanOn:
    """Where a model ran: name and version of the ``runtime``, and the runtime's name of the ``device``."""

    runtime: str
    device: str


@dataclass(frozen=True)
class GoldenCheck:
    """Golden images: ``pixel_diff`` in grey levels (decode and resize), ``diff`` and ``atol`` by
    :func:`cmt_edge.deploy.measure.parity.distance` (numerics).

    ``output`` is the one that comes closest to its tolerance: ``"logits"``, or a feature map.
    """

    images: Count
    pixel_diff: Annotated[int, Between(0, 255)]
    diff: Difference
    atol: Difference
    passed: bool
    output: str = LOGITS


@dataclass(frozen=True)
class DataCheck:
    """Labelled images; percentages. ``reference_*`` is the PyTorch model, ``drop`` = reference top-1 minus
    the bundle's.

    ``drop_ci`` is the 95 % interval of the paired difference (Newcombe 1998, method 10).
    ``reference_source`` says where the reference answers come from; the logit differences need a reference
    that runs here and are ``None`` otherwise.
    """

    images: Count
    top1: Percent
    reference_top1: Percent
    agreement: Percent
    drop: float
    drop_ci: tuple[float, float]
    max_drop: float
    passed: bool
    reference_source: str
    logit_max_diff: float | None = None
    logit_mean_diff: float | None = None

    @property
    def doubt(self) -> str:
        """Why the images do not show that the drop is small enough; empty where they do, or where the drop
        itself is too large."""
        high = self.drop_ci[1]
        if not self.passed or high <= self.max_drop:
            return ""
        return (
            f"{self.images} images cannot show that the drop is at most {self.max_drop:g} points: it may be"
            f" up to {high:.2f} points (95 % interval); verify on more images"
        )


@dataclass(frozen=True, kw_only=True)
class VerificationEntry:
    """What the verification of a bundle found.

    Attributes:
        bundle: name or path of the bundle.
        precision: what was asked for.
        runtime: where the bundle ran.
        golden: the check of the golden images.
        data: the check of labelled images, where there were some.
        notes: readable.
        passed: whether every check passed.
        steps: step of the export -> largest difference of the outputs from the reference; only in a manifest.
    """

    bundle: str
    precision: str
    runtime: RanOn
    golden: GoldenCheck
    data: DataCheck | None
    notes: tuple[str, ...]
    passed: bool
    steps: dict[str, Difference] | None = field(default=None, metadata=OMITTED)


@dataclass(frozen=True)
class ExecutedPrecision:
    """What a runtime really ran, from its own execution graph.

    Attributes:
        time_share: precision -> share of the run time; the shares sum to 1. It is empty where the runtime
            measures no times.
        operations: precision -> number of executed operations.
        conversion_share: share of the time spent on reorders and type conversions.
        source: where the figures come from.
    """

    time_share: dict[str, Share] = field(default_factory=dict)
    operations: dict[str, Count] = field(default_factory=dict)
    conversion_share: Share = 0.0
    source: str = ""

    def summary(self) -> str:
        """For a table, e.g. ``"int8 58 % + bf16 42 %"``."""
        total = max(1, sum(self.operations.values()))
        counted = {precision: number / total for precision, number in self.operations.items()}
        shares = self.time_share or counted
        ordered = sorted(shares.items(), key=lambda item: -item[1])
        shown = [f"{precision} {100 * share:.0f} %" for precision, share in ordered if share >= LEAST_SHARE]
        return " + ".join(shown) or "unknown"


@dataclass(frozen=True, kw_only=True)
class LatencyEntry:
    """A quick measurement of the bundle where it was exported or built; milliseconds of one batch.

    Attributes:
        p50_ms, p95_ms: percentiles of the model alone.
        ci_ms: 95 % interval of ``p50_ms``.
        end_to_end_p50_ms: median from encoded image to answer.
        batch: images in a batch.
        threads: CPU threads; ``None`` for all.
        executed: the precisions that really ran.
        warnings: readable.
    """

    p50_ms: Duration
    ci_ms: tuple[Duration, Duration]
    p95_ms: Duration
    end_to_end_p50_ms: Duration
    batch: Size
    threads: Size | None
    executed: ExecutedPrecision
    warnings: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """The options that an engine depends on; ``profile`` is ``None`` where the batch size is fixed."""

    workspace: float | None
    level: int
    profile: tuple[int, int, int] | None
    tf32: bool


@dataclass(frozen=True, kw_only=True)
class EngineKey:
    """Everything that an engine depends on; equal keys mean that an engine may be used again.

    Attributes:
        onnx: SHA-256 of ``model.onnx``.
        tensorrt, cuda, driver: versions.
        gpu: name and number of multiprocessors.
        sm: compute capability, for example ``"8.7"``.
        options: of the build.
    """

    onnx: str
    tensorrt: str
    cuda: str
    driver: str
    gpu: str
    sm: str
    options: BuildOptions


@dataclass(frozen=True, kw_only=True)
class EngineEntry:
    """The engine that ``cmt-build`` made.

    Attributes:
        file: name of the engine in the bundle.
        key: what it depends on.
        seal: proof that this machine built it.
        report, text: names of the device report in the bundle, as JSON and as Markdown.
        golden: the check of the golden images.
        low_precision_share: share of the layers that compute in the asked precision or below.
    """

    file: str
    key: EngineKey
    seal: str
    report: str
    text: str
    golden: GoldenCheck
    low_precision_share: float


@dataclass(frozen=True, kw_only=True)
class Host:
    """The machine that something was made or measured on.

    Attributes:
        machine: architecture, for example ``"x86_64"``.
        system: operating system.
        python: version.
        cpu: model of the processor.
        flags: those of its instruction sets that matter here.
        cores: CPU cores that the process may use.
        mhz: clock of the first core in MHz, as the system writes it.
        governor: frequency governor of the first core.
        temperature_mc: of the first thermal zone, in thousandths of a degree Celsius, as the system writes
            it.
    """

    machine: str
    system: str
    python: str
    cpu: str
    flags: tuple[str, ...]
    cores: Size | None
    mhz: str | None = field(default=None, metadata=OMITTED)
    governor: str | None = field(default=None, metadata=OMITTED)
    temperature_mc: str | None = field(default=None, metadata=OMITTED)


@dataclass(frozen=True)
class Variant:
    """One way to build the model; ``keep_float`` as in :class:`cmt_edge.calib.Recipe`."""

    name: str
    precision: str
    keep_float: tuple[str, ...] = ()


@dataclass(frozen=True)
class Accuracy:
    """Percentages and percentage points; ``drop`` is disagreement where no labels are known (then ``top1`` is
    ``None``)."""

    images: int
    top1: float | None
    agreement: float
    drop: float
    drop_ci: tuple[float, float]
    deviation: float


@dataclass(frozen=True)
class Speed:
    """Milliseconds of one batch, model only; ``ratio`` of the first variant's median to this one's (above 1
    is faster), 95 % intervals."""

    p50: float
    ci: tuple[float, float]
    ratio: float
    ratio_ci: tuple[float, float]
    size_bytes: int
    executed: str = ""
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Candidate:
    """A variant with what was measured; ``why_not`` is empty if it passes."""

    variant: Variant
    accuracy: Accuracy | None = None
    speed: Speed | None = None
    why_not: str = ""

    @property
    def passes(self) -> bool:
        return not self.why_not


@dataclass(frozen=True)
class Sensitivity:
    """A group of ``nodes`` operations, alone in int8: the damage it does."""

    group: str
    nodes: int
    accuracy: Accuracy


@dataclass(frozen=True, kw_only=True)
class VerdictEntry:
    """What ``--precision auto`` measured and chose.

    Attributes:
        labelled: whether the images had labels; without them a drop is disagreement with fp32.
        max_drop: allowed drop, percentage points.
        latency_budget: allowed median latency of one batch, milliseconds.
        candidates: everything that was considered; the float32 reference comes first.
        sensitivity: groups of operations, the most sensitive first.
        winner: ``None`` if nothing passes.
        tied: names of passing variants whose speed is not clearly different from the fastest one's.
        notes: readable.
        isa: the instruction set that the runtime was limited to.
        runtime: name and version.
        threads: CPU threads; ``None`` for all.
        batch: images in a batch, 0 if it is dynamic.
        host: the machine.
        data: the calibration images.
        float_already: groups of operations that are float in every int8 candidate.
    """

    labelled: bool
    max_drop: float
    latency_budget: float | None
    candidates: tuple[Candidate, ...]
    sensitivity: tuple[Sensitivity, ...]
    winner: Variant | None
    tied: tuple[str, ...]
    notes: tuple[str, ...]
    isa: str | None
    runtime: str
    threads: int | None
    batch: Count
    host: Host
    data: ImagesEntry
    float_already: tuple[str, ...]
