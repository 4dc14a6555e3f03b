"""Makes every write, fsync, rename, mkdir, open, removal and read of real commands fail, one after another.

    python scripts/attack_crashes.py [--scenario NAME ...] [--every N] [--minutes M] [--folder DIR]

Each call fails with ENOSPC (once, and for good), EIO and EACCES, or its process is killed. Afterwards the
exit code must be one of those that the documentation names, without a trace; the bundle must be the old one
or the new one, whole; and after the next run nothing may be left. Needs Linux and gcc. The exit code is 0 if
all of that held.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from cmt_edge import Bundle, ExportConfig, export

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from helpers.crashes import Attack, exports, faults_of


def main() -> int:
    """Run the attack; returns the exit code."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--scenario", action="append", help="only these (default: all)")
    p.add_argument("--every", type=int, default=1, help="only every N-th fault")
    p.add_argument("--first", type=int, default=0, help="number of the first fault, from 0")
    p.add_argument("--minutes", type=float, default=1e9, help="largest time of each scenario, minutes")
    p.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")
    args = p.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        os.environ["CMT_EDGE_CACHE"] = str(Path(name) / "own-cache")
        failures = attack(Path(name), args)
    return 1 if failures else 0


def attack(folder: Path, args: argparse.Namespace) -> int:
    """All scenarios; the number of broken promises."""
    config = ExportConfig("cmt_nano", format="onnx", output=str(folder / "made"))
    bundle: Bundle = export(config)
    image = bundle.golden().sources[0]
    failures = 0
    with Attack(folder) as attacker:
        for name, scenario in exports(bundle, image).items():
            if args.scenario and name not in args.scenario:
                continue
            start = time.monotonic()
            counts = {kind: attacker.count(scenario, kind) for kind in scenario.kinds}
            codes: Counter[int] = Counter()
            broken = 0
            for fault in itertools.islice(faults_of(counts), args.first, None, args.every):
                if time.monotonic() > start + 60 * args.minutes:
                    break
                outcome = attacker.attempt(scenario, fault)
                codes[outcome.code] += 1
                if outcome.complaint:
                    broken += 1
                    print(f"  {name}, {fault} at {outcome.call}: {outcome.complaint}", flush=True)
            failures += broken
            calls = ", ".join(f"{count} {kind}" for kind, count in counts.items())
            ends = ", ".join(f"{count} x {code}" for code, count in sorted(codes.items()))
            spent = f"{time.monotonic() - start:.0f} s"
            print(
                f"{name}: {codes.total()} faults ({calls}); exit codes {ends}; {broken} broken; {spent}",
                flush=True,
            )
    return failures


if __name__ == "__main__":
    sys.exit(main())
