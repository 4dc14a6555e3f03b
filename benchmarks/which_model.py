"""Which model for a budget of milliseconds: published top-1 against latency, for every model of the registry
and for well-known models of timm.

    pip install --no-deps --target TIMM timm==1.0.31
    python benchmarks/which_model.py export --folder WORK --timm TIMM [MODEL ...]
    python benchmarks/which_model.py measure --folder WORK [--slice N] [--calls N] [--again] [MODEL ...]
    python benchmarks/which_model.py estimate --folder WORK [MODEL ...]
    python benchmarks/which_model.py draw [--folder WORK [--machine NAME]]

``export`` writes bundles with random weights in fp32 and int8, which is calibrated on a few generated
images: latency depends on neither. ``measure`` takes some models at a time; every slice also measures one
reference, ResNet-50 in fp32, in the same turns, so that slices can be compared. With ``--again`` it measures
the named models although they have figures: the median of all slices is then the figure. ``estimate`` lets
TensorRT for RTX compile the models in fp16 and keeps its roofline's estimate; it needs no GPU. Every stage
leaves out what it finds in the folder, so that it can be stopped and started again. ``draw`` collects what
there is in a JSON file and writes the page and the plots; without ``--folder`` it draws the JSON file again.
Slices that the JSON file has and the folder lacks stay, if they are of the same processor, version of
OpenVINO and protocol; otherwise nothing is written. Another processor gets a JSON file, a plot and tables of
its own with ``--machine NAME``, which names the parts of the page that are its own; estimates for a GPU go to
the page's own file from every machine. Where the processor has no bfloat16, bf16 is left out.

timm's models need no torchvision. timm lies in a folder of its own, which only ``export`` reads.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from which_model_subjects import Subject, choose_subjects

PAGE = Path(__file__).parent.parent / "docs" / "which-model.md"
"""The page that ``draw`` writes, beside its JSON file and its plots."""
SLICE = 5
"""How many models one slice measures."""


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_intermixed_args(argv)
    run: Callable[[argparse.Namespace], None] = STAGES[args.stage]
    run(args)
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The stages and their flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("stage", choices=list(STAGES))
    parser.add_argument("models", nargs="*", metavar="MODEL", help="only these (default: all)")
    parser.add_argument("--folder", type=Path, help="where bundles and figures lie")
    parser.add_argument("--timm", type=Path, help="folder that timm was installed into")
    parser.add_argument(
        "--slice", type=int, default=SLICE, help=f"models that are measured at a time ({SLICE})"
    )
    parser.add_argument("--calls", type=int, help="least number of calls of each model in a slice")
    parser.add_argument("--machine", default="", help="name of the machine, where it is not the page's own")
    parser.add_argument("--again", action="store_true", help="measure the named models once more")
    parser.add_argument("--page", type=Path, default=PAGE, help="page that is drawn (docs/which-model.md)")
    return parser


def run_export(args: argparse.Namespace) -> None:
    """Export what has not been."""
    from outside_models import stand_in_for_torchvision
    from which_model_stages import export_all

    if args.timm:
        sys.path.append(str(args.timm))
    stand_in_for_torchvision()
    export_all(choose_subjects(args.models), require_folder(args))


def run_measure(args: argparse.Namespace) -> None:
    """Measure the next slice: models that have bundles and no figures, or those that are named."""
    from which_model_stages import find_unmeasured, measure_slice, write_json

    if args.again and not args.models:
        raise SystemExit("error: --again needs the names of models")
    folder, subjects = require_folder(args), choose_subjects(args.models)
    chosen = subjects if args.again else find_unmeasured(subjects, folder)[: args.slice]
    if not chosen:
        print("nothing is left to measure")
        return
    number = sum(1 for _ in (folder / "measure").glob("*.json")) + 1
    place = folder / "measure" / f"{number:03}_{chosen[0].key}.json"
    write_json(place, measure_slice(chosen, folder, args.calls))


def run_estimate(args: argparse.Namespace) -> None:
    """Compile what has not been."""
    from which_model_stages import estimate_all

    estimate_all(choose_subjects(args.models), require_folder(args))


def run_draw(args: argparse.Namespace) -> None:
    """Write the JSON file of the machine, where there is a folder, and the page and the plots from all of
    them."""
    from which_model_page import locate_machine, write_page
    from which_model_report import collect, keep_measured, read_results, take_estimates, write_results

    own, place = locate_machine(args.page, ""), locate_machine(args.page, args.machine)
    if args.machine and not args.folder:
        raise SystemExit("error: --machine needs --folder; without both, all machines are drawn")
    if args.folder:
        subjects: list[Subject] = choose_subjects([])
        found = collect(subjects, args.folder, read_results(place) if place.exists() else None)
        write_results(keep_measured(found) if args.machine else found, place)
        if args.machine:
            write_results(take_estimates(read_results(own), subjects, args.folder), own)
    write_page(read_results(own), args.page)


STAGES: dict[str, Callable[[argparse.Namespace], None]] = {
    "export": run_export,
    "measure": run_measure,
    "estimate": run_estimate,
    "draw": run_draw,
}
"""What each stage runs."""


def require_folder(args: argparse.Namespace) -> Path:
    """The folder of the work; raises ``SystemExit`` where none was given."""
    if not args.folder:
        raise SystemExit(f"error: {args.stage} needs --folder")
    folder: Path = args.folder
    return folder


if __name__ == "__main__":
    raise SystemExit(main())
