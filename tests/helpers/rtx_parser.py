"""Parses and builds ONNX files with the real TensorRT for RTX, in a process of its own:

    python -m helpers.rtx_parser FOLDER

prints a JSON object: for each ``*.onnx`` in the folder the parser's errors, the builder's, and whether an
engine was built; under ``operators`` those of ``operators.json`` that the parser says it supports; and under
``classes`` the names that each class of the module has.
"""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import onnx
import pytest

REASON = "tensorrt-rtx-cu12 is not installed (the extra rtx)"
needs_rtx = pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason=REASON)
"""Skips a test where the real package is absent."""


def parse_all(folder: Path, graphs: dict[str, onnx.ModelProto], operators: list[str]) -> dict[str, Any]:
    """What the real parser and builder make of ``graphs``, by their names."""
    names = list(graphs)
    for i, name in enumerate(names):
        (folder / f"{i}.onnx").write_bytes(graphs[name].SerializeToString())
    (folder / "operators.json").write_text(json.dumps(operators))
    done = subprocess.run(
        [sys.executable, "-m", "helpers.rtx_parser", str(folder)],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[1],
    )
    found = json.loads(done.stdout.splitlines()[-1])
    rest = {name: found[name] for name in ("operators", "classes")}
    return {name: found[str(i)] for i, name in enumerate(names)} | rest


@cache
def open_builder() -> Any:
    """The module, a builder, and the log that it writes to."""
    import tensorrt_rtx as trt

    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity.name in ("ERROR", "INTERNAL_ERROR"):
                self.errors.append(message)

    log = Log()
    return trt, trt.Builder(log), log


def try_graph(content: bytes) -> dict[str, Any]:
    """Parse and build one graph."""
    trt, builder, log = open_builder()
    log.errors.clear()
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    parsed = parser.parse(content)
    errors = [parser.get_error(i).desc() for i in range(parser.num_errors)]
    built = False
    if parsed:
        config = builder.create_builder_config()
        config.builder_optimization_level = 0
        source = network.get_input(0)
        if -1 in source.shape:
            profile = builder.create_optimization_profile()
            shape = tuple(2 if size == -1 else size for size in source.shape)
            profile.set_shape(source.name, shape, shape, shape)
            config.add_optimization_profile(profile)
        built = builder.build_serialized_network(network, config) is not None
    return {"parsed": parsed, "built": built, "errors": errors, "log": log.errors[-3:]}


def main(folder: Path) -> None:
    found: dict[str, Any] = {
        path.stem: try_graph(path.read_bytes()) for path in sorted(folder.glob("*.onnx"))
    }
    trt, builder, log = open_builder()
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    names = json.loads((folder / "operators.json").read_text())
    found["classes"] = {
        name: [*dir(value), *getattr(value, "__members__", ())]
        for name, value in vars(trt).items()
        if isinstance(value, type)
    }
    found["operators"] = [name for name in names if parser.supports_operator(name)]
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
