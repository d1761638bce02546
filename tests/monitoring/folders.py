"""Folders as runs leave them, of made-up numbers; names are those of somebody who means ill, if asked for."""

import csv
import json
import math
import random

from bootgrad.experiments import idealized
from bootgrad.experiments.table import Table
from bootgrad.monitoring import CSVWriter, Flag, JSONLWriter, LayerObservation, Observation, Outlier

HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>&amp;"
COLUMNS = ("step", "epoch", "loss", "covariance_trace", "sq_mean_norm", "noise_scale", "reg1", "reg2", "seconds")


def train_folder(folder, steps=120, reg1=0.01, data="digits", last=0.1):
    """A run of ``bootgrad train`` of four epochs."""
    folder.mkdir(parents=True)
    draw = random.Random(0)
    with open(folder / "run.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*COLUMNS, "test_loss", "test_accuracy"])
        for k in range(steps):
            loss = last + 2.2 * math.exp(-5 * k / steps) * draw.uniform(0.9, 1.1)
            is_end = (k + 1) % (steps // 4) == 0
            tested = [f"{loss * 1.1}", f"{1 - loss / 3}"] if is_end else ["", ""]
            row = [k + 1, 1 + 4 * k // steps, loss, 10 * loss, loss / 10, 30 + k, 9 * loss if reg1 else "", "", 0.01]
            writer.writerow([*row, *tested])
    settings = {
        "data": data,
        "reg1": reg1,
        "reg2": 0.0,
        "batch_size": 32,
        "lr": 0.001,
        "optimizer": "adam",
        "threads": None,
    }
    record = {
        "date": "2026-01-02T03:04:05+00:00",
        "settings": settings,
        "data": {"image_shape": [1, 8, 8], "train": 256},
        "parameters": 89930,
        "device": {"device": "cpu", "name": data},
        "versions": {"torch": "2.13.0", "torchvision": None},
        "seconds_per_step": {"this": 0.02, "plain": 0.01, "ratio": 2.0, "pairs": 9},
    }
    (folder / "run.json").write_text(json.dumps(record))
    return folder


def compare_folder(folder):
    """Three runs side by side."""
    for name, reg1, last in (("plain", 0.0, 0.3), ("reg1", 0.01, 0.1), ("reg1_reg2", 0.01, 0.2)):
        train_folder(folder / name, reg1=reg1, last=last)
    return folder


PLACES = [
    {"date": date, "versions": {"torch": torch}} for date, torch in (("2026-01-01", "2.11.0"), ("2026-01-01", "2.13.0"))
]


def experiment_folder(folder, name="idealized", text="both are **alike**, as `sgd` is"):
    """An experiment that has come to its end."""
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(
        json.dumps({"experiment": {"name": name, "full": False, "seeds": 3, "data": None}, "places": PLACES})
    )
    zeros = dict.fromkeys(idealized.COLUMNS, 0.0)
    rows = [
        zeros
        | {"stage": "final", "basin": "shared", "lr": 0.1, "method": method, "seed": seed, "test_loss": loss + seed / 9}
        for method, loss in (("sgd 4", 1.0), ("sgd 4 + reg1", 0.9))
        for seed in range(3)
    ]
    Table(idealized.COLUMNS, rows).write(folder / "results.csv")
    (folder / "figure.png").write_bytes(PIXEL)
    lines = [
        f"# {name}: a line",
        "",
        text,
        "over two lines",
        "",
        "## Verdicts",
        "",
        "| claim | mean [95 % interval] | verdict |",
        "|---|---:|---|",
        "| a is below b | 0.5 [0.25, 0.75] | **holds** |",
        "| b is below c | -1.5e+03 [-2e+03, 1] | **unclear** |",
        "",
        "![figure](figure.png)",
        "![figure](https://example.org/figure.png)",
        "",
        "- one [link](https://example.org)",
        "- two",
        "",
    ]
    (folder / "summary.md").write_text("\n".join(lines))
    return folder


def monitor_folder(folder, layer="block.conv", sample="image 7", kind="jsonl", count=40):
    """What a monitor has written: Γ that jumps at the last step but one, and a sample that is met often."""
    writer = (JSONLWriter if kind == "jsonl" else CSVWriter)(folder / f"monitor.{kind}")
    for k in range(count):
        trace = (900.0 if k == count - 2 else 9.0) * math.exp(-k / 10)
        flags = (
            (Flag("covariance_trace", trace, 3.0), Flag("covariance_trace", trace, 3.0, layer))
            if k == count - 2
            else ()
        )
        writer.write(
            Observation(
                50 * k,
                32,
                loss=2.0 * math.exp(-k / 30),
                covariance_trace=trace,
                sq_mean_norm=1.0 + k,
                noise_scale=math.inf if k == 0 else 20.0 + k,
                layers={
                    layer: LayerObservation(0.75 * trace, 0.5, 9.0),
                    "head": LayerObservation(0.25 * trace, 0.5, None),
                },
                norms={0.0: 1.0, 0.25: 2.0, 0.5: 3.0, 0.75: 4.0, 0.95: 5.0, 1.0: 50.0 + k},
                outliers=(Outlier(sample, 50.0 + k, 3),) if k % 2 else (Outlier(k, 7.0, 0), Outlier(sample, 5.0, 1)),
                flags=flags,
            )
        )
    writer.close()
    return folder


def narrow_folder(folder):
    """What a monitor has written late in a long run, of a loss that hardly moves."""
    writer = JSONLWriter(folder / "monitor.jsonl")
    for k in range(12):
        loss = 1234.5 + 0.01 * math.sin(k)
        writer.write(
            Observation(1_200_000 + 1000 * k, 32, loss=loss, covariance_trace=1 + 1e-5 * k, sq_mean_norm=1e-7 * k)
        )
    writer.close()
    return folder


PIXEL = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108060000001f15c4890000000d49444154789c6360606060000000050001a5f645400000"
    "000049454e44ae426082"
)
