"""``cmt-edge serve-repo``: bundles as a folder that an inference server reads."""

from __future__ import annotations

import argparse
import shlex
from dataclasses import fields
from pathlib import Path

from cmt_edge.startup import name_program

from ..backends.base import read_batch_limit
from ..bundle import Bundle, require_outside_bundles
from ..report import to_json
from ..serving import SERVERS, Options, Repository, Served, make_repository
from .console import add_key_flag, make_parser, run_command
from .output import say, say_folded
from .ranges import INSTANCES, MICROSECONDS, SERVED_BATCHES, THREADS, VERSIONS

RUNTIMES = ("onnxruntime", "openvino", "tensorrt")
"""Runtimes that the servers have."""
START = {
    "triton": "tritonserver --model-repository={folder}",
    "ovms": "ovms --config_path {folder}/config.json --port 8001",
}
"""Server -> the command that starts it on a repository."""
EXAMPLES = """\
examples:
  %(prog)s cmt_xs_int8_openvino -o models --for ovms
  %(prog)s cmt_xs_fp32_onnx cmt_xs_int8_onnx -o models --for triton --instances 2
"""
"""What ``--help`` prints last."""


def main(argv: list[str] | None = None) -> int:
    """Entry point of ``cmt-edge serve-repo``."""
    return run_command(_main, build_parser().parse_args(argv))


def build_parser() -> argparse.ArgumentParser:
    """The flags of ``cmt-edge serve-repo``; those of how models are served are named as in ``Options``."""
    p = make_parser(
        name_program("serve-repo"),
        "Write bundles as a model repository for Triton or OpenVINO Model Server. Check the server with:"
        f" {name_program('verify')} BUNDLE --backend kserve --device HOST:PORT/MODEL",
        EXAMPLES,
    )
    p.add_argument("bundles", type=Path, nargs="+", metavar="BUNDLE")
    p.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="the repository, a new folder",
    )
    p.add_argument("--for", dest="server", type=str.lower, choices=SERVERS, required=True, help="the server")
    how = p.add_argument_group("how the models are served")
    how.add_argument(
        "--runtime",
        type=str.lower,
        choices=RUNTIMES,
        help="what runs the graphs in the server (default: the one of each bundle's format)",
    )
    how.add_argument(
        "--max-batch",
        type=SERVED_BATCHES.parse_whole,
        help="largest batch that Triton makes of requests, for dynamic graphs (default 8)",
    )
    how.add_argument(
        "--queue-delay-us",
        type=MICROSECONDS.parse_whole,
        default=Options.queue_delay_us,
        help="microseconds that Triton lets a request wait for others (default %(default)s)",
    )
    how.add_argument(
        "--instances",
        type=INSTANCES.parse_whole,
        default=Options.instances,
        help="copies of each model that run at once (default %(default)s)",
    )
    how.add_argument(
        "--threads",
        type=THREADS.parse_whole,
        help="CPU threads of one inference (default: the server's)",
    )
    how.add_argument(
        "--model-version",
        dest="version",
        metavar="MODEL_VERSION",
        type=VERSIONS.parse_whole,
        default=Options.version,
        help="number of the models' version (default %(default)s)",
    )
    how.add_argument(
        "--allow-bf16",
        action="store_true",
        help="let Triton's OpenVINO compute in bfloat16 what the bundle computes in float32; it has no"
        " setting that prevents it",
    )
    add_key_flag(p)
    return p


def _main(args: argparse.Namespace) -> int:
    require_outside_bundles(args.output)
    options = Options(**{field.name: getattr(args, field.name) for field in fields(Options)})
    bundles = [Bundle.open(path, key=args.key) for path in args.bundles]
    made = make_repository(bundles, args.server, args.output, options)
    start = START[made.server].format(folder=shlex.quote(str(made.path)))
    if args.json:
        say(to_json(_make_json(made, start)))
        return 0
    for model in made.models:
        say_folded(f"{model.name}: {model.runtime}, {_describe_batches(model)}")
        for note in model.notes:
            say_folded(f"  note: {note}")
    say_folded(f"repository: {made.path}\nnext:\n  {start}")
    return 0


def _describe_batches(model: Served) -> str:
    """Which batches the server computes."""
    if model.max_batch:
        return f"batches of up to {model.max_batch}"
    return "its own batch size alone" if read_batch_limit(model.bundle) else "batches as clients send them"


def _make_json(made: Repository, start: str) -> dict[str, object]:
    """The object of ``--json``."""
    models = [
        {
            "name": model.name,
            "bundle": str(model.bundle.title),
            "runtime": model.runtime,
            "max_batch": model.max_batch,
            "notes": list(model.notes),
        }
        for model in made.models
    ]
    return {"repository": str(made.path), "server": made.server, "models": models, "start": start}
