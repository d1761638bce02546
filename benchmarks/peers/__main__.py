"""The whole comparison: layer cases, then networks one after the other; files are written after each.

    python -m benchmarks.peers [--quick] [--networks mlp,reference] [--data cifar.npz]     (make bench-peers)

Exit code 1 if bootgrad is wrong anywhere, or fails with anything but an error of its own.
"""

import argparse
import os
import statistics
import sys
from pathlib import Path

import torch

from ..models import PEER_TASKS
from ..results import FOLDER
from . import chart, page, rows
from .cases import CASES, outcomes
from .measuring import IMAGES, PLAIN, ask
from .oracle import Outcome
from .ways import WAYS


def judge() -> list[rows.Row]:
    """Every peer on every layer case."""
    return [rows.judged(case, *found) for case in CASES for found in outcomes(case)]


def measure(network: str, options: argparse.Namespace) -> list[rows.Row]:
    """Every peer on one network: memory first, so that what is too large is not there when the others are timed."""
    memory: dict[str, int] = {}
    failed: dict[str, Outcome] = {}
    for way in (PLAIN, *WAYS):
        answers = []
        while len(answers) < options.memory_runs and way.name not in failed:
            answer = ask(network, "memory", [way.name], options)
            if isinstance(answer, Outcome):
                failed[way.name] = answer
            else:
                answers.append(answer)
        if answers:
            memory[way.name] = statistics.median_low(answers)
    if PLAIN.name in failed:
        sys.exit(f"{network}: the plain step itself failed: {failed[PLAIN.name].why}")
    able = [way.name for way in WAYS if way.name not in failed]
    times = ask(network, "time", able, options)
    if isinstance(times, Outcome):
        failed |= dict.fromkeys(able, times)
        times = {}
    task = PEER_TASKS[network]
    images = options.data and task.shape == IMAGES
    place = {"network": network, "data": Path(options.data).name if images else "random", "batch": str(task.batch_size)}
    plain = times.get(PLAIN.name, {}).get("milliseconds")
    found = [rows.timed(place, "plain", "plain", Outcome("right"), plain, plain, (memory[PLAIN.name],) * 2)]
    for way in WAYS:
        answer = times.get(way.name, {})
        if answer.get("failure"):
            failed[way.name] = Outcome("refuses", why=answer["failure"])
        for quantity in way.quantities:
            outcome = failed.get(way.name) or Outcome(**answer["outcomes"][quantity])
            figures = ()
            if outcome.status == "right":
                figures = (answer.get("milliseconds"), plain, (memory[way.name], memory[PLAIN.name]))
            found.append(rows.timed(place, way.peer, quantity, outcome, *figures))
    return found


def main() -> None:
    """Run what is asked for, and put it in the place of what earlier runs found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round; to see that everything runs")
    parser.add_argument("--networks", default=",".join(PEER_TASKS), help="of %(default)s")
    parser.add_argument(
        "--data", help="NPZ file of 32×32 colour images, as `bootgrad train` takes it; random numbers without"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--seconds", type=float, default=60, help="a way's share per network; it has one round at least"
    )
    parser.add_argument("--memory-runs", type=int, default=1, help="processes per memory figure, of which the median")
    parser.add_argument(
        "--out", type=Path, default=FOLDER, help="folder of peers.csv, peers_correctness.csv, peers.png"
    )
    parser.add_argument("--page", type=Path, default=FOLDER.parents[1] / "docs/peers.md")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.seconds, options.memory_runs = 1, 3, 1
    networks = [name for name in options.networks.split(",") if name]
    if unknown := set(networks) - set(PEER_TASKS):
        parser.error(f"--networks takes {', '.join(PEER_TASKS)}; got {', '.join(sorted(unknown))}")
    torch.set_num_threads(options.threads)

    judgements = judge()
    rows.write(options.out / "peers_correctness.csv", judgements)
    timings = rows.read(options.out / "peers.csv")
    found = list(judgements)
    for network in networks:
        measured = measure(network, options)
        found += measured
        timings = rows.merged(timings, measured, list(PEER_TASKS))
        rows.write(options.out / "peers.csv", timings)
        print("\n".join(page.network_table(measured)), flush=True)
    if timings:
        chart.draw(timings, options.out / "peers.png")
    picture = os.path.relpath(options.out / "peers.png", options.page.parent)
    options.page.parent.mkdir(parents=True, exist_ok=True)
    options.page.write_text(page.render(timings, judgements, picture), encoding="utf-8")
    if faults := [row for row in found if rows.is_fault(row)]:
        sys.exit(
            "\n".join(f"bootgrad, {row.get('case') or row['network']}: {row['status']} {row['why']}" for row in faults)
        )


if __name__ == "__main__":
    main()
