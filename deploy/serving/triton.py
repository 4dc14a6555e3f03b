"""Model repositories of Triton: a folder a model, with ``config.pbtxt`` and numbered versions.

Sources: Triton's documentation, "Model Repository", "Model Configuration" and ``model_config.proto``; the
README of its OpenVINO backend ("Parameters") and of its ONNX Runtime backend ("Model config options").
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..bundle.sections import TensorEntry
from ..errors import InputError
from ..escaping import escape_line
from .served import WRITERS, Options, Served

CONFIG = "config.pbtxt"
"""Name of a model's settings."""
LABELS = "labels.txt"
"""Name of a model's labels, one a line, in the order of its logits."""
WARMUP = "golden"
"""Name of the batch of golden images, raw little-endian float32, in the folder ``warmup``."""
INDENT = "  "
"""What one level of the settings is moved in by."""


@dataclass(frozen=True)
class Word:
    """A value of an enumeration, which stands without quotes."""

    text: str


KIND_CPU, KIND_GPU = Word("KIND_CPU"), Word("KIND_GPU")
"""Where the instances of a model run."""
FLOAT = Word("TYPE_FP32")
"""The type of all our inputs and outputs."""

FILES = {"onnxruntime": "model.onnx", "openvino": "model.xml", "tensorrt": "model.plan"}
"""Name of a runtime -> the file that Triton opens."""
THREADS = {"onnxruntime": "intra_op_thread_count", "openvino": "INFERENCE_NUM_THREADS"}
"""Name of a runtime -> its parameter for the CPU threads of one inference."""


def check(model: Served, options: Options) -> tuple[str, ...]:
    """What differs from our own Predictor in Triton, one sentence each.

    Raises:
        InputError: the server would compute something else than the bundle says.
    """
    precision = model.bundle.manifest.precision
    if model.runtime == "onnxruntime" and precision == "bf16":
        raise InputError(
            "is a bf16 bundle, which ONNX Runtime does not run on a processor",
            where=model.bundle.path,
            remedy="use --runtime openvino, or export an fp32 or int8 bundle",
        )
    if model.runtime != "openvino" or precision == "bf16":
        return ()
    what = "all of it" if precision == "fp32" else "what is not int8"
    if not options.allow_bf16:
        raise InputError(
            f"is an {precision} bundle, and Triton's OpenVINO backend has no setting that keeps float32",
            where=model.bundle.path,
            why=f"on a processor with bfloat16 instructions OpenVINO computes {what} in bfloat16",
            remedy="use --for ovms, which has the setting; or --runtime onnxruntime; or --allow-bf16 if that"
            " is what you want",
        )
    return (f"on a processor with bfloat16 instructions, {what} is computed in bfloat16",)


def write_model(model: Served, options: Options, root: Path) -> None:
    """Write the folder of a model into a repository."""
    folder = root / model.name
    version = folder / str(options.version)
    version.mkdir(parents=True)
    WRITERS[model.runtime](model.bundle, version)
    (folder / CONFIG).write_text(make_config(model, options))
    (folder / "warmup").mkdir()
    (folder / "warmup" / WARMUP).write_bytes(model.make_batch().astype("<f4").tobytes())
    if has_labels(model):
        lines = [escape_line(label) for label in model.bundle.labels]
        (folder / LABELS).write_text("".join(f"{line}\n" for line in lines))


def has_labels(model: Served) -> bool:
    """Whether each value of the model's only output has a label."""
    manifest = model.bundle.manifest
    return len(manifest.outputs) == 1 and manifest.outputs[0].shape[-1] == len(manifest.labels)


def make_config(model: Served, options: Options) -> str:
    """The text of ``config.pbtxt``."""
    return "\n".join(_iterate_lines(_describe(model, options), "")) + "\n"


def _describe(model: Served, options: Options) -> dict[str, Any]:
    manifest = model.bundle.manifest
    outputs = [_describe_tensor(entry, model) for entry in manifest.outputs]
    if has_labels(model):
        outputs[0]["label_filename"] = LABELS
    content: dict[str, Any] = {
        "name": model.name,
        "backend": model.runtime,
        "default_model_filename": FILES[model.runtime],
        "max_batch_size": model.max_batch,
        "input": [_describe_tensor(manifest.input, model)],
        "output": outputs,
        "instance_group": [
            {
                "count": options.instances,
                "kind": KIND_GPU if model.runtime == "tensorrt" else KIND_CPU,
            }
        ],
    }
    if model.max_batch:
        content["dynamic_batching"] = {"max_queue_delay_microseconds": options.queue_delay_us}
    content["parameters"] = list(_iterate_parameters(model, options))
    content["model_warmup"] = [_describe_warmup(model)]
    return content


def _describe_tensor(entry: TensorEntry, model: Served) -> dict[str, Any]:
    """An input or output; where the server batches, its sizes are those of one image."""
    sizes = entry.shape[1:] if model.max_batch else entry.shape
    return {"name": entry.name, "data_type": FLOAT, "dims": list(sizes)}


def _describe_warmup(model: Served) -> dict[str, Any]:
    """One inference of golden images before the model counts as ready."""
    entry = _describe_tensor(model.bundle.manifest.input, model)
    value = {"data_type": FLOAT, "dims": entry["dims"], "input_data_file": WARMUP}
    return {
        "name": "golden images",
        "batch_size": 1,
        "inputs": [{"key": entry["name"], "value": value}],
    }


def _iterate_parameters(model: Served, options: Options) -> Iterator[dict[str, Any]]:
    """Settings of the backend."""
    found: dict[str, str] = {}
    if model.runtime == "openvino":
        found["PERFORMANCE_HINT"] = "LATENCY"
        if model.bundle.manifest.precision == "bf16":
            found["HINT_BF16"] = "YES"
    if options.threads and model.runtime in THREADS:
        found[THREADS[model.runtime]] = str(options.threads)
    for key, value in found.items():
        yield {"key": key, "value": {"string_value": value}}


def _iterate_lines(message: Mapping[str, Any], indent: str) -> Iterator[str]:
    """A message in protobuf's text format; a list is a field that is repeated."""
    for name, value in message.items():
        if isinstance(value, Mapping):
            yield f"{indent}{name} {{"
            yield from _iterate_lines(value, indent + INDENT)
            yield f"{indent}}}"
        elif isinstance(value, Sequence) and not isinstance(value, str):
            for part in value:
                yield from _iterate_lines({name: part}, indent)
        else:
            yield f"{indent}{name}: {_format_scalar(value)}"


def _format_scalar(value: object) -> str:
    """A word or a number as it is, a text in quotes, with everything but ASCII as octal bytes."""
    if isinstance(value, Word):
        return value.text
    if isinstance(value, str):
        data = json.dumps(value, ensure_ascii=False).encode()
        return "".join(chr(byte) if byte < 0x80 else f"\\{byte:03o}" for byte in data)
    return str(value)
