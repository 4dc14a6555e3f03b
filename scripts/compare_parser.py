"""Compares our rules of TensorRT's parser with the real one, on the graphs of ONNX's own tests of operations.

    python scripts/compare_parser.py

It needs the extra ``rtx``, and takes some minutes. Each graph whose operations our list has, and in which our
rules for TensorRT for RTX find nothing, is parsed and built by the real one without a GPU. What it refuses is
printed; the exit code is 0, because many of these graphs have inputs that no image classifier has.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import onnx
from onnx.backend.test.loader import load_model_tests

from cmt_edge.deploy.tensorrt.bindings import RTX
from cmt_edge.deploy.tensorrt.parser_rules import SUPPORTED, find_parser_problems

ROOT = Path(__file__).resolve().parent.parent
"""The checkout."""
OPSET, IR_VERSION = 20, 9
"""The newest that our rules let pass; newer graphs are read as of these."""
ENDS = "inputs and outputs must be float32"
"""A rule of our own sessions, which says nothing about the parser."""
NO_PROFILE = "no optimization profile has been defined"
"""What the builder says of a graph that takes a shape as an input, which this script gives no values."""
TRY = """
import sys
from pathlib import Path
from helpers.rtx_parser import try_graph
print()
for name in sys.argv[1:]:
    found = try_graph(Path(name).read_bytes())
    words = (found["errors"] or found["log"] or [""])[0].splitlines()
    print(Path(name).stem, found["parsed"] and found["built"], *words[-1:], sep="\\t", flush=True)
"""
"""Runs in a process of its own, since a parser may crash: tries graphs, one line each."""
TOGETHER = 50
"""The number of graphs that one process tries."""


def list_graphs() -> Iterator[tuple[str, onnx.ModelProto]]:
    """Names and graphs of ONNX's tests whose operations our list has."""
    for case in load_model_tests(kind="node"):
        graph = case.model
        if graph is None or not {node.op_type for node in graph.graph.node} <= SUPPORTED:
            continue
        graph.opset_import[0].version = min(graph.opset_import[0].version, OPSET)
        graph.ir_version = min(graph.ir_version, IR_VERSION)
        try:
            onnx.checker.check_model(graph)
        except onnx.checker.ValidationError:
            continue
        yield case.name, graph


def try_files(files: list[Path]) -> dict[str, str]:
    """Name -> what the real parser or builder says, of each graph that it refuses."""
    command = (sys.executable, "-W", "ignore", "-c", TRY, *map(str, files))
    done = subprocess.run(command, cwd=ROOT / "tests", capture_output=True, text=True, check=False)
    lines = [line.split("\t") for line in done.stdout.splitlines() if "\t" in line]
    refused = {name: " ".join(words) for name, accepted, *words in lines if accepted != "True"}
    left = files[len(lines) :]
    if left:
        refused[left[0].stem] = f"the process ended with {done.returncode}"
        refused |= try_files(left[1:]) if left[1:] else {}
    return refused


def main() -> int:
    """Try every graph, print what was refused, and the counts."""
    graphs = dict(list_graphs())
    with tempfile.TemporaryDirectory() as folder:
        files = []
        for name, graph in graphs.items():
            findings = [found for found in find_parser_problems(graph, RTX) if ENDS not in found]
            if not findings:
                files.append(Path(folder) / f"{name}.onnx")
                files[-1].write_bytes(graph.SerializeToString())
        refused: dict[str, str] = {}
        for i in range(0, len(files), TOGETHER):
            refused |= try_files(files[i : i + TOGETHER])
    unknown = {name for name, words in refused.items() if NO_PROFILE in words}
    for name in sorted(refused.keys() - unknown):
        print(f"{name}: {refused[name]}")
    print(
        f"{len(graphs)} graphs; our rules let {len(files)} pass, the real parser and builder refuse"
        f" {len(refused) - len(unknown)} of them; {len(unknown)} were not tried to the end"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
