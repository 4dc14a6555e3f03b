"""Model repositories of OpenVINO Model Server: ``config.json`` and a folder a model with numbered versions.

Sources: OpenVINO Model Server's documentation, "Model Server Parameters", "Classic Models" and "Starting the
Server"; the schema that the server checks ``config.json`` with.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import InputError
from .served import Options, Served, write_ir

CONFIG = "config.json"
"""Name of the server's settings."""
BF16, FLOAT32 = "bf16", "f32"
"""OpenVINO's names of the precisions that a processor computes in what is not quantized."""


def check(model: Served, options: Options) -> tuple[str, ...]:
    """What differs from our own Predictor in this server: nothing.

    Raises:
        InputError: the name of the model is taken by the settings, or an option is of Triton alone.
    """
    if model.name == CONFIG:
        raise InputError(
            f"is called {CONFIG}, as the settings of the server",
            where=model.bundle.path,
            remedy="rename the folder",
        )
    given = {
        "--max-batch": options.max_batch is not None,
        "--queue-delay-us": options.queue_delay_us != Options.queue_delay_us,
    }
    for flag, is_given in given.items():
        if is_given:
            raise InputError(
                f"{flag} means nothing for OpenVINO Model Server, which makes no batches of requests",
                remedy=f"leave {flag} out, and raise --instances",
            )
    return ()


def write_model(model: Served, options: Options, root: Path) -> None:
    """Write the folder of a model into a repository."""
    version = root / model.name / str(options.version)
    version.mkdir(parents=True)
    write_ir(model.bundle, version)


def write_config(models: Sequence[Served], options: Options, root: Path) -> None:
    """Write the settings of the server; a model's folder is named relative to them."""
    entries = [{"config": _describe(model, options)} for model in models]
    (root / CONFIG).write_text(json.dumps({"model_config_list": entries}, indent=2) + "\n")


def _describe(model: Served, options: Options) -> dict[str, Any]:
    plugin: dict[str, Any] = {
        "PERFORMANCE_HINT": "THROUGHPUT" if options.instances > 1 else "LATENCY",
        "INFERENCE_PRECISION_HINT": BF16 if model.bundle.manifest.precision == "bf16" else FLOAT32,
    }
    if model.bundle.manifest.precision == "int8":
        plugin["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = 0  # as our own sessions have it
    if options.threads:
        plugin["INFERENCE_NUM_THREADS"] = options.threads * options.instances  # all streams share them
    content: dict[str, Any] = {
        "name": model.name,
        "base_path": model.name,
        "target_device": "CPU",
        "plugin_config": plugin,
    }
    if options.instances > 1:
        plugin["NUM_STREAMS"] = options.instances
        content["nireq"] = options.instances
    return content
