"""Which names of NVIDIA's Python modules our code uses."""

from __future__ import annotations

import ast

from helpers.paths import ROOT

CODE = tuple(
    ROOT / "deploy" / "tensorrt" / f"{name}.py" for name in ("session", "builder", "bindings", "jit")
)
RTX_ALONE = {
    ("config", "num_compute_capabilities"),
    ("config", "set_compute_capability"),
    ("engine", "create_runtime_config"),
}
"""What is used of TensorRT for RTX only, of objects that both products have."""
RTX_RECEIVERS = {"jit_config": "IRuntimeConfig", "runtime_cache": "IRuntimeCache"}
"""The same as :data:`RECEIVERS` for objects that only TensorRT for RTX has."""
RECEIVERS = {
    "builder": "Builder",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "config": "IBuilderConfig",
    "profile": "IOptimizationProfile",
    "timings": "ITimingCache",
    "error": "ParserError",
    "engine": "ICudaEngine",
    "self._engine": "ICudaEngine",
    "runtime": "Runtime",
    "context": "IExecutionContext",
    "self.context": "IExecutionContext",
    "worker.context": "IExecutionContext",
    "inspector": "EngineInspector",
    "network.get_input(0)": "ITensor",
}
"""Expressions in our code that hold an object of TensorRT."""


def list_uses() -> list[tuple[str, str]]:
    """Every ``expression.name`` of our code."""
    found = []
    for path in CODE:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute):
                found.append((ast.unparse(node.value), node.attr))
    return found


def find_module(expression: str) -> str:
    """An expression as it would read where the module is called ``trt``."""
    return expression.removeprefix("self._bindings.").removeprefix("bindings.")
