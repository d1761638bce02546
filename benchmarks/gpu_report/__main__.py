"""The command: build, run the sections in order of worth, write the report.

    python -m benchmarks.gpu_report [--device cuda|cpu] [--sections correctness,ops,…] [--seconds 480] [--tune]

Files: benchmarks/results/gpu/<device>-<date>.{csv,json,md,png}, or --out; into the folder $OUT, too, where that is set.
Fails where a result is wrong. A run of some sections keeps the others' rows of the same day.
"""

import argparse
import dataclasses
import json
import os
import sys
import tempfile
import time
from pathlib import Path

from . import build, machine, page, roofline, tune, worker
from .in_place import ROOT
from .options import Options
from .rows import Store

RESULTS = ROOT / "benchmarks/results"
# In order of worth: seconds at most, and processes at a time. A section that is over early leaves its time to the others.
SECTIONS = {
    "correctness": (160, 12),
    "ceilings": (15, 1),
    "ops": (80, 1),
    "steps": (130, 1),
    "capture": (45, 1),
    "tune": (300, 1),
    "sanitize": (50, 4),
}
OPTIONAL = ("tune",)


def main() -> int:
    """Run; returns the exit status."""
    options = _parser().parse_args()
    deadline = time.time() + options.seconds
    folder = _folder(options)
    chosen = options.sections.split(",") if options.sections else [s for s in SECTIONS if s not in OPTIONAL]
    chosen += ["tune"] if options.tune and "tune" not in chosen else []
    unknown = set(chosen) - set(SECTIONS)
    if unknown:
        raise SystemExit(f"no such sections: {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")

    machine.require(options.device)
    built = {} if options.no_build else build.build(options.device, options.seconds / 2)
    found = machine.describe(options.device) | built
    for name, value in found.items():
        print(f"{name}: {value}", flush=True)
    setting = machine.setting(found)
    folders = [folder] + ([Path(os.environ["OUT"])] if os.environ.get("OUT") else [])
    store = Store(folders, machine.stem(options.device, setting), setting, found, page.render)
    request = Options(
        options.device,
        *(tuple(filter(None, text.split(","))) for text in (options.ops, options.models, options.backends)),
        spoil=options.spoil,
        limits=ceilings(store),
        until=deadline,
    )
    for section in [name for name in SECTIONS if name in chosen]:
        _run(section, request, store, 2 if options.device == "cpu" else None)
        request = dataclasses.replace(request, limits=ceilings(store))
    roofline.draw(store, request.limits)
    _winners(store)
    return _verdict(store, "correctness" in chosen, folder)


def _verdict(store: Store, compared: bool, folder: Path) -> int:
    """What is wrong, last, where it is seen; the exit status."""
    wrong = store.wrong()
    right = any(row["section"] == "correctness" and row["status"] == "ok" for row in store.rows)
    print(f"\n{folder / store.stem}.md: {len(store.rows)} rows, {len(wrong)} wrong")
    if compared and not right:
        print("no op was found right")
    for row in wrong[:40]:
        where = " ".join(filter(None, (row[name] for name in ("section", "subject", "case", "backend", "dtype"))))
        print(f"{where}: {row['status']} {row['error']} {row['detail']}")
    return 1 if wrong or (compared and not right) else 0


def _run(section: str, request: Options, store: Store, jobs: int | None) -> None:
    seconds, side_by_side = SECTIONS[section]
    store.begin(section)
    start = time.time()
    print(f"\n{section}", flush=True)

    def add(**values):
        row = store.add(section, **values)
        if section != "correctness" or row["status"] not in ("ok", "skipped"):
            shown = ("subject", "case", "backend", "dtype", "status", "microseconds", "ratio", "percent", "memory_mib")
            print("  " + "  ".join(row[name] for name in (*shown, "error", "detail") if row[name]), flush=True)

    worker.run(section, request, seconds, add, min(jobs or side_by_side, side_by_side))
    count = sum(row["section"] == section for row in store.rows)
    print(f"  {count} rows in {time.time() - start:.0f} s", flush=True)


def _winners(store: Store) -> None:
    """Configurations that beat the kernels' tables, beside the report."""
    found = tune.winners(store.rows)
    for folder in store.folders if found else ():
        text = json.dumps(found, indent=1, ensure_ascii=False) + "\n"
        (folder / f"{store.stem}-tuned.json").write_text(text, encoding="utf-8")


def ceilings(store: Store) -> dict[str, float]:
    """What the section of that name has measured: bytes and operations per second."""
    found = {}
    for row in store.rows:
        if row["section"] == "ceilings" and row["status"] == "ok":
            amount = float(row["bytes"] or row["operations"])
            found[row["subject"]] = amount / (1e-6 * float(row["microseconds"]))
    return found


def _folder(options: argparse.Namespace) -> Path:
    if options.device == "cuda":
        return options.out or RESULTS / "gpu"
    folder = options.out or Path(tempfile.mkdtemp(prefix="bootgrad-report-"))
    if machine.is_below(folder, RESULTS):
        raise SystemExit(f"{RESULTS} is for what GPUs measured: choose another --out for a report of the CPU")
    return folder


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--sections", default="", help=f"of {', '.join(SECTIONS)}; all but tune when absent")
    parser.add_argument(
        "--seconds", type=float, default=480, help="after which nothing is begun or continued; half are for compilers"
    )
    parser.add_argument("--ops", default="", help="parts of names of ops, with commas")
    parser.add_argument("--models", default="", help="names of tasks in benchmarks/models.py, with commas")
    parser.add_argument("--backends", default="", help="cuda, triton, eager, or a CPU's compiled, with commas")
    parser.add_argument("--out", type=Path, help="folder of the report")
    parser.add_argument("--tune", action="store_true", help="sweep the kernels' tables of configurations, too")
    parser.add_argument("--no-build", action="store_true", help="take the extension libraries as they are")
    parser.add_argument("--spoil", default="", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
