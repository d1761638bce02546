import csv
import json
import math
import random

import pytest

from bootgrad.cli import main
from bootgrad.diagnosis import diagnose
from bootgrad.errors import DataError
from bootgrad.experiments import alignment, idealized
from bootgrad.experiments.table import Table
from bootgrad.training import checkpoint

STEPS = 60


def train_folder(folder, traces, reg1=0.0, reg1_at_end=0.0, loss=1.0, test_loss=1.0):
    """What ``bootgrad train`` leaves, of made-up numbers."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"reg1": reg1, "reg2": 0.0, "batch_size": 128, "lr": 0.1}
    (folder / "run.json").write_text(json.dumps({"settings": settings}))
    with open(folder / "run.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ["step", "loss", "covariance_trace", "reg1", "reg2", "test_loss"])
        writer.writeheader()
        for k in range(STEPS):
            trace = traces[0] + (traces[1] - traces[0]) * k / (STEPS - 1)
            test = test_loss if k == STEPS - 1 else ""
            values = {"step": k, "loss": loss, "covariance_trace": trace, "reg1": reg1_at_end if reg1 else ""}
            writer.writerow(values | {"reg2": "", "test_loss": test})
    return folder


def experiment_folder(folder, losses, lr=0.1):
    """What ``bootgrad experiment idealized`` leaves; ``losses`` are of each method by seed."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text(json.dumps({"experiment": {"name": "idealized"}}))
    other = dict.fromkeys(idealized.COLUMNS, 0.0) | {"stage": "final", "basin": "shared", "lr": lr}
    rows = [
        other | {"method": method, "seed": seed, "test_loss": loss}
        for method, values in losses.items()
        for seed, loss in enumerate(values)
    ]
    Table(idealized.COLUMNS, [*rows, other | {"stage": "search 1", "method": "sgd 4", "test_loss": math.inf}]).write(
        folder / "results.csv"
    )
    return folder


def found(folder):
    return [
        f"{finding.where}: {finding.signature}" if finding.where else finding.signature for finding in diagnose(folder)
    ]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"traces": (10, 1)}, []),
        ({"traces": (10, 9)}, ["Γ does not fall"]),
        ({"traces": (10, 1), "reg1": 0.1, "reg1_at_end": 1.0}, []),
        ({"traces": (10, 1), "reg1": 0.001, "reg1_at_end": 1.0}, ["the penalty has nothing left to do"]),
        ({"traces": (10, 1), "reg1": 0.1, "reg1_at_end": 50.0}, ["the penalty outweighs the loss"]),
    ],
)
def test_signatures_of_a_run(tmp_path, options, expected):
    assert found(train_folder(tmp_path, **options)) == expected


def test_a_run_that_diverged(tmp_path):
    folder = train_folder(tmp_path, (10, 1))
    lines = (folder / "run.csv").read_text().splitlines()
    (folder / "run.csv").write_text("\n".join([*lines[:-1], lines[-1].replace(",1.0,", ",inf,", 1)]) + "\n")
    (folder / "run.json").unlink()
    settings = {"reg1": 0.0, "reg2": 0.0, "batch_size": 128, "lr": 0.1}
    checkpoint.save(folder / "checkpoint.pt", dict.fromkeys(checkpoint.KEYS) | {"settings": settings})
    assert found(folder) == ["diverges"]


def test_a_loss_that_rises(tmp_path):
    folder = train_folder(tmp_path, (10, 1))
    lines = (folder / "run.csv").read_text().splitlines()
    (folder / "run.csv").write_text(
        "\n".join([*lines[:-20], *(x.replace(",1.0,", ",9.0,", 1) for x in lines[-20:])]) + "\n"
    )
    assert found(folder) == ["diverges"]


def test_an_experiment_without_final_runs(tmp_path):
    with pytest.raises(DataError, match="no final runs yet: go on"):
        diagnose(experiment_folder(tmp_path, {}))


def test_test_losses_are_those_at_the_end(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"experiment": {"name": "alignment"}}))
    other = dict.fromkeys(alignment.COLUMNS, 0.0) | {"stage": "final", "lr": 0.1}
    rows = [
        other | {"method": method, "seed": seed, "progress": progress, "test_loss": loss + seed / 100}
        for method, losses in {"sgd": (0.5, 0.5), "sgd + reg1": (2.0, 0.4)}.items()
        for progress, loss in zip((0.5, 1.0), losses, strict=True)
        for seed in range(4)
    ]
    Table(alignment.COLUMNS, rows).write(tmp_path / "results.csv")
    assert found(tmp_path) == []


def test_variants_are_named_and_compared(tmp_path):
    train_folder(tmp_path / "plain", (10, 1), test_loss=1.0)
    train_folder(tmp_path / "reg1", (10, 9), reg1=0.1, reg1_at_end=1.0, test_loss=1.5)
    assert found(tmp_path) == ["reg1: Γ does not fall", "reg1: ends worse than plain"]


def seeds(mean, spread=0.01, n=5, seed=0):
    draw = random.Random(seed)
    return [mean + spread * draw.uniform(-1, 1) for _ in range(n)]


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ({"sgd 4": seeds(1.0), "gd + reg1": seeds(0.5), "noisy gd": seeds(2.0)}, []),
        ({"sgd 4": seeds(1.0), "noisy gd": seeds(0.5)}, ["isotropic noise does as well as SGD"]),
        ({"sgd 4": seeds(1.0), "noisy gd": [3.0, 2.0, 0.9, 1.5, 1.1]}, []),  # by chance or not, it is worse
        ({"gd": seeds(1.0), "gd + reg1": seeds(1.5)}, ["gd + reg1: hurts at the highest learning rate"]),
        ({"gd": seeds(3.0), "gd + reg1": seeds(1.0), "sgd 4": seeds(0.5)}, []),  # better than what it is added to
        ({"sgd 4": seeds(1.0, 0.5), "gd": seeds(1.0, 0.5, seed=1)}, ["seeds differ more than methods"]),
        ({"sgd 4": seeds(1.0), "gd": [*seeds(0.5, n=4), math.inf]}, ["gd: diverges"]),
    ],
)
def test_signatures_of_an_experiment(tmp_path, losses, expected):
    assert found(experiment_folder(tmp_path, losses)) == expected


def test_every_finding_says_what_it_means_and_what_to_try(tmp_path, capsys):
    assert main(["diagnose", str(train_folder(tmp_path, (10, 9)))]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Γ does not fall"
    assert [line.split(":")[0].strip() for line in lines[1:]] == ["seen", "meaning", "try"]
    assert "batch 128, lr 0.1" in lines[1]


def test_nothing_found_is_said(tmp_path, capsys):
    assert main(["diagnose", str(train_folder(tmp_path, (10, 1)))]) == 0
    assert "no signature of failure was found" in capsys.readouterr().out


def test_other_folders_are_refused(tmp_path, capsys):
    assert main(["diagnose", str(tmp_path)]) == 2
    assert "must hold run.json and run.csv of bootgrad train" in capsys.readouterr().err
    train_folder(tmp_path, (10, 1))
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(DataError, match="cannot be read"):
        diagnose(tmp_path)
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(DataError, match="no whole run"):
        diagnose(tmp_path)
    (tmp_path / "results.csv").write_text("method\n")
    with pytest.raises(DataError, match="not that of an experiment"):
        diagnose(tmp_path)
