import csv
import json
import math
import random
from collections import Counter

import pytest

from bootgrad.cli import main
from bootgrad.diagnosis import diagnose
from bootgrad.errors import DataError
from bootgrad.experiments import alignment, cnn, conduct, idealized, small_data, sparse_regression, variability
from bootgrad.experiments.conduct import EXPERIMENTS
from bootgrad.experiments.table import Table
from bootgrad.training import checkpoint

STEPS = 60


def falling(first=4.0, last=1.0, n=STEPS):
    return [first + (last - first) * k / (n - 1) for k in range(n)]


def train_folder(folder, traces, reg1=0.0, reg1_at_end=0.0, losses=None, test_loss=1.0):
    """What ``bootgrad train`` leaves, of made-up numbers; ``traces`` Γ falls between, or all; without them it is not known."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"reg1": reg1, "reg2": 0.0, "batch_size": 128, "lr": 0.1}
    (folder / "run.json").write_text(json.dumps({"settings": settings}))
    losses = losses or falling()
    with open(folder / "run.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ["step", "loss", "covariance_trace", "reg1", "reg2", "test_loss"])
        writer.writeheader()
        series = falling(*traces, len(losses)) if isinstance(traces, tuple) else traces or losses
        for k, (loss, trace) in enumerate(zip(losses, series, strict=True)):
            test = test_loss if k == len(losses) - 1 else ""
            values = {"step": k, "loss": loss, "covariance_trace": trace if traces else ""}
            writer.writerow(values | {"reg1": reg1_at_end if reg1 else "", "reg2": "", "test_loss": test})
    return folder


def write(folder, name, module, rows):
    """What ``bootgrad experiment`` leaves; columns that a row does not tell are zero."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text(json.dumps({"experiment": {"name": name}}))
    zeros = dict.fromkeys(module.COLUMNS, 0.0)
    Table(module.COLUMNS, [zeros | row for row in rows]).write(folder / "results.csv")
    (folder / "summary.md").write_text("")
    return folder


def experiment_folder(folder, losses, lr=0.1):
    """An experiment with a column of methods; ``losses`` are of each by seed, a list or a dictionary."""
    searched = {"stage": "search 1", "basin": "all", "method": "sgd 4", "seed": -1, "test_loss": math.inf}
    rows = [
        {"stage": "final", "basin": "shared", "lr": lr, "method": method, "seed": seed, "test_loss": loss}
        for method, values in losses.items()
        for seed, loss in (values.items() if isinstance(values, dict) else enumerate(values))
    ]
    return write(folder, "idealized", idealized, [searched, *rows])


def ways_folder(folder, losses):
    """An experiment with columns of problems and ways; ``losses`` are by problem, way and seed."""
    rows = [
        {"batch": batch, "stage": "final", "way": way, "lr": 0.1, "seed": seed, "test_loss": loss}
        | {"strength": 0.0 if way.startswith("sgd") else 0.01}
        for batch, ways in losses.items()
        for way, values in ways.items()
        for seed, loss in enumerate(values)
    ]
    return write(folder, "cnn", cnn, rows)


def found(folder):
    return [
        f"{finding.where}: {finding.signature}" if finding.where else finding.signature for finding in diagnose(folder)
    ]


def seeds(mean, spread=0.01, n=5, seed=0):
    draw = random.Random(seed)
    return [mean + spread * draw.uniform(-1, 1) for _ in range(n)]


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
    folder = train_folder(tmp_path, (10, 1), losses=[*falling()[:-1], math.inf])
    (folder / "run.json").unlink()
    settings = {"reg1": 0.0, "reg2": 0.0, "batch_size": 128, "lr": 0.1}
    checkpoint.save(folder / "checkpoint.pt", dict.fromkeys(checkpoint.KEYS) | {"settings": settings})
    assert found(folder) == ["diverges"]


def test_a_penalized_run_that_diverged_is_not_judged_by_its_infinite_loss(tmp_path):
    losses = [*falling()[:-20], *[math.inf] * 20]
    assert found(train_folder(tmp_path, (10, 1), losses=losses, reg1=0.1, reg1_at_end=1.0)) == ["diverges"]


def test_a_loss_that_rises(tmp_path):
    assert found(train_folder(tmp_path, (10, 1), losses=[1.0] * 40 + [9.0] * 20)) == ["diverges"]
    noise = random.Random(0)
    slowly = [loss + noise.gauss(0, 0.05) for loss in falling(2.3, 3.0)]
    assert found(train_folder(tmp_path, (10, 1), losses=slowly)) == ["diverges"]


def test_a_loss_that_jumps(tmp_path):
    jump = [2.3, 6e9, 2e9, 1e9, 1e7, 1e5]
    assert found(train_folder(tmp_path, (10, 1), losses=[*jump, *falling(1000, 8, STEPS - 6)])) == ["diverges"]
    assert found(train_folder(tmp_path, (10, 1), losses=[*jump, *falling(1000, 0.1, STEPS - 40), *[0.1] * 34])) == []


@pytest.mark.parametrize(("floor", "drift", "sigma"), [(0.35, 0.0, 0.08), (0.1, 0.015, 0.002)])
@pytest.mark.parametrize("time_constant", [1, 30])
def test_a_loss_that_falls_at_once_is_not_judged_by_its_floor_alone(tmp_path, floor, drift, sigma, time_constant):
    noise, n = random.Random(5), 3000
    losses = [floor + 2 * math.exp(-k / time_constant) + drift * k / n + noise.gauss(0, sigma) for k in range(n)]
    assert found(train_folder(tmp_path, (10, 1), losses=losses)) == []
    rising = train_folder(tmp_path, (10, 1), losses=[*losses, *[3.0] * (n // 5)])
    assert found(rising) == ["diverges"] and f"loss {losses[0]:.3g} at the beginning, 3 " in diagnose(rising)[0].seen


def test_a_jump_is_no_beginning_that_a_loss_falls_from(tmp_path):
    noise = random.Random(6)
    losses = [2.3, 1000, 500, 50, 7, *[2.3 + noise.gauss(0, 0.05) for _ in range(1000)]]
    assert found(train_folder(tmp_path, (10, 1), losses=losses)) == ["does not learn"]


def test_a_trace_that_falls_at_once_falls(tmp_path):
    noise = random.Random(7)
    traces = [1 + 9 * math.exp(-k / 5) + noise.gauss(0, 0.1) for k in range(1000)]
    assert found(train_folder(tmp_path, traces, losses=falling(n=1000))) == []
    assert found(train_folder(tmp_path, traces[200:], losses=falling(n=800))) == ["Γ does not fall"]


def test_a_loss_that_stays_is_not_one_that_rises(tmp_path):
    noise, counts = random.Random(3), Counter()
    for _ in range(100):
        losses = [2.3 + noise.gauss(0, 0.05) for _ in range(STEPS)]
        counts.update(found(train_folder(tmp_path, (10, 1), losses=losses)))
    assert set(counts) == {"does not learn"} and counts["does not learn"] >= 95


def test_of_a_run_that_does_not_learn_nothing_is_said_about_its_trace(tmp_path):
    assert found(train_folder(tmp_path, (10, 9), losses=[2.3] * STEPS)) == ["does not learn"]


def test_a_rise_within_the_noise_is_none(tmp_path):
    noise = random.Random(4)
    for _ in range(100):
        losses = [2.3 + noise.gauss(0, 0.7) for _ in range(STEPS)]
        assert "diverges" not in found(train_folder(tmp_path, (10, 1), losses=losses))


def test_what_a_run_does_not_tell_is_said(tmp_path, capsys):
    short = diagnose(train_folder(tmp_path / "short", (10, 1), losses=falling(n=9)))
    assert [f.signature for f in short] == ["cannot be judged"] and "9 steps: ten are needed" in short[0].seen
    unknown = train_folder(tmp_path / "unknown", None)
    assert found(unknown) == ["cannot be judged"]
    assert main(["diagnose", str(unknown)]) == 0
    out = capsys.readouterr().out
    assert "Γ is known in fewer than ten steps" in out and "no signature" not in out


def test_an_experiment_without_final_runs(tmp_path):
    with pytest.raises(DataError, match="no final runs yet: go on"):
        diagnose(experiment_folder(tmp_path, {}))


def test_test_losses_are_those_at_the_end(tmp_path):
    rows = [
        {
            "stage": "final",
            "lr": 0.1,
            "method": method,
            "seed": seed,
            "progress": progress,
            "test_loss": loss + seed / 100,
        }
        for method, losses in {"sgd": (0.5, 0.5), "sgd + reg1": (2.0, 0.4)}.items()
        for progress, loss in zip((0.5, 1.0), losses, strict=True)
        for seed in range(4)
    ]
    assert found(write(tmp_path, "alignment", alignment, rows)) == []


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_is_judged(tmp_path, name):
    module = conduct.find(name)
    column = "method" if "method" in module.COLUMNS else "way"
    rows = [
        {"stage": "final", column: way, "lr": 0.1, "strength": strength, "seed": seed, "test_loss": loss}
        for way, strength, loss in (("sgd", 0.0, 0.1), ("reg1", 0.01, math.inf), ("both", 0.01, math.inf))
        for seed in range(5)
    ]
    assert found(write(tmp_path, name, module, rows)) == ["reg1: diverges", "both: diverges"]


def test_problems_are_judged_one_by_one(tmp_path):
    losses = {16: {"sgd": seeds(1.0), "reg1": seeds(1.5)}, 128: {"sgd": seeds(2.0), "reg1": seeds(1.5)}}
    assert found(ways_folder(tmp_path, losses)) == ["batch 16, reg1: ends worse than plain"]
    diverged = {16: {"sgd": seeds(1.0), "reg1": seeds(0.5)}, 128: {"sgd": seeds(1.0), "reg1": [math.inf] * 5}}
    assert found(ways_folder(tmp_path, diverged)) == ["batch 128, reg1: diverges"]


def test_rows_that_have_no_test_loss_are_no_runs(tmp_path):
    rows = [
        {"stage": "final", "way": way, "seed": seed, "moment": 1.0, "strength": strength, "test_loss": loss + seed}
        for way, strength, loss in (("sgd", 0.0, 1.0), ("reg1", 0.1, 0.5))
        for seed in range(5)
    ]
    rows += [{"stage": "covariance", "way": "sgd", "seed": s, "moment": 0.5, "test_loss": math.nan} for s in range(5)]
    assert found(write(tmp_path, "small-data", small_data, rows)) == []


def grid(lrs, losses_of, stage="final"):
    return [
        {"stage": stage, "method": method, "lr": lr, "seed": seed, "validation_loss": loss, "test_loss": loss}
        for method in ("sgd", "sgd + penalties")
        for lr in lrs
        for seed, loss in enumerate(losses_of(method, lr))
    ]


def test_of_a_grid_the_settings_are_judged_that_the_search_prefers(tmp_path):
    def losses_of(method, lr):
        if lr == 1.0:
            return [math.inf] * 5
        return seeds(0.5 if method == "sgd" else 0.4 if lr == 0.1 else 0.9)

    rows = [*grid((0.1, 0.3, 1.0), losses_of, "search"), *grid((0.1, 0.3, 1.0), losses_of)]
    folder = write(tmp_path, "sparse-regression", sparse_regression, rows)
    assert found(folder) == ["sgd + penalties: hurts at the highest learning rate"]
    assert "at lr 0.3" in diagnose(folder)[0].seen


def test_a_penalty_that_diverges_where_plain_steps_do_not_hurts(tmp_path):
    def losses_of(method, lr):
        losses = seeds(0.5 if method == "sgd" else 0.4)
        return [math.inf, *losses[1:-1], math.nan] if method != "sgd" and lr == 0.3 else losses

    rows = [*grid((0.1, 0.3), losses_of, "search"), *grid((0.1, 0.3), losses_of)]
    folder = write(tmp_path, "sparse-regression", sparse_regression, rows)
    assert found(folder) == ["sgd + penalties: hurts at the highest learning rate"]
    assert diagnose(folder)[0].seen == "at lr 0.3, 2 of 5 runs diverged, none of sgd"


@pytest.mark.parametrize(
    ("test_losses", "scores", "expected"),
    [
        ({"gd": seeds(1.0, 0.5), "sgd 4": seeds(1.1, 0.5, seed=1)}, (2, 1), ["gd: seeds differ more than methods"]),
        ({"gd": seeds(1.0, 0.5), "sgd 4": seeds(1.1, 0.5, seed=1)}, (1, 2), ["sgd 4: seeds differ more than methods"]),
        ({"sgd 1": seeds(1.0), "sgd 4": seeds(0.7), "noisy gd": seeds(0.9)}, (2, 1, 0), []),
        (
            {"sgd 1": seeds(1.0), "sgd 4": seeds(0.7), "noisy gd": seeds(0.9)},
            (1, 2, 0),
            ["isotropic noise does as well as SGD"],
        ),
    ],
)
def test_what_others_are_compared_with_is_chosen_by_the_search(tmp_path, test_losses, scores, expected):
    searched = [
        {"stage": "search 1", "method": method, "lr": 0.1, "seed": 1000, "validation_loss": score}
        for method, score in zip(test_losses, scores, strict=True)
    ]
    final = [
        {"stage": "final", "method": method, "lr": 0.1, "seed": seed, "test_loss": loss}
        for method, values in test_losses.items()
        for seed, loss in enumerate(values)
    ]
    assert found(write(tmp_path, "idealized", idealized, [*searched, *final])) == expected


def test_stages_of_other_names_are_final_runs(tmp_path):
    rows = [
        {"stage": stage, "method": method, "seed": seed, "strength": strength, "step": step, "test_loss": loss}
        | {"validation_loss": loss}
        for stage, method, strength, losses in (
            ("search 1", "sgd + reg1", 0.1, [0.5]),
            ("share 1", "sgd", 0.0, seeds(1.0)),
            ("share 0.3", "sgd + reg1", 0.03, seeds(0.2)),
            ("share 1", "sgd + reg1", 0.1, seeds(1.5)),
        )
        for step in (100, 400)
        for seed, loss in enumerate(losses)
    ]
    assert found(write(tmp_path, "variability", variability, rows)) == ["sgd + reg1: ends worse than plain"]


def test_seeds_are_paired_by_their_number(tmp_path):
    base = [0.1, 0.9, 0.4, 0.7, 0.2]
    mine = {seed: base[seed] - 0.1 for seed in (4, 2, 0, 1, 3)}
    assert found(experiment_folder(tmp_path, {"gd": base, "gd + reg1": mine})) == []
    plain, mine = {s: base[s] for s in (0, 1, 2, 3)}, {s: base[s] + 0.1 for s in (1, 2, 3, 4)}
    assert found(experiment_folder(tmp_path, {"gd": plain, "gd + reg1": mine})) == ["gd + reg1: ends worse than plain"]


def test_what_an_experiment_does_not_tell_is_said(tmp_path, monkeypatch):
    folder = experiment_folder(tmp_path, {"gd": seeds(1.0)})
    assert found(folder) == ["gd: cannot be judged"]
    assert "no other method" in diagnose(folder)[0].seen
    folder = experiment_folder(tmp_path, {"gd": seeds(1.0), "gd + reg1": [1.0]})
    assert found(folder) == ["gd + reg1: cannot be judged"]
    assert "fewer than two seeds in common with gd" in diagnose(folder)[0].seen
    columns = ("stage", "seed", "train_loss")
    monkeypatch.setattr(idealized, "COLUMNS", columns)
    write(tmp_path, "idealized", idealized, [{"stage": "final"}])
    assert found(tmp_path) == ["cannot be judged"]
    assert "it lacks method, validation_loss, test_loss" in diagnose(tmp_path)[0].seen


def test_variants_are_named_and_compared(tmp_path):
    train_folder(tmp_path / "plain", (10, 1), test_loss=1.0)
    train_folder(tmp_path / "reg1", (10, 9), reg1=0.1, reg1_at_end=1.0, test_loss=1.5)
    assert found(tmp_path) == ["reg1: Γ does not fall", "reg1: ends worse than plain"]


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ({"sgd 4": seeds(1.0), "gd + reg1": seeds(0.5), "noisy gd": seeds(2.0)}, []),
        ({"sgd 4": seeds(1.0), "noisy gd": seeds(0.5)}, ["isotropic noise does as well as SGD"]),
        ({"sgd 4": seeds(1.0), "noisy gd": seeds(1.01, seed=1)}, ["isotropic noise does as well as SGD"]),
        ({"sgd 4": seeds(1.0), "noisy gd": seeds(1.1, seed=1)}, []),
        (  # against SGD of as many steps
            {"sgd": seeds(1.0), "sgd, 33 × the steps": seeds(0.7), "noisy gd": seeds(0.98)},
            ["isotropic noise does as well as SGD"],
        ),
        (  # the mean difference is below zero, the interval ±1.9
            {"sgd 4": [1, 1.5, 0.5, 2, 0.2], "noisy gd": [1.9, 0.1, 1.9, 0.1, 1.15]},
            ["noisy gd: seeds differ more than methods"],
        ),
        (
            {"sgd 1": [math.inf] * 5, "sgd 4": seeds(1.0), "noisy gd": seeds(0.5)},
            ["sgd 1: diverges", "isotropic noise does as well as SGD"],
        ),
        ({"gd": seeds(1.0), "gd + reg1": seeds(1.5)}, ["gd + reg1: ends worse than plain"]),
        ({"gd": seeds(3.0), "gd + reg1": seeds(1.0), "sgd 4": seeds(0.5)}, []),  # better than what it is added to
        ({"sgd 4": seeds(1.0, 0.5), "gd": seeds(1.1, 0.5, seed=1)}, ["gd: seeds differ more than methods"]),
        ({"gd": [0.1, 0.9, 0.4, 0.7, 0.2], "gd + reg1": [0.0, 0.79, 0.31, 0.6, 0.1]}, []),  # apart, seed by seed
        ({"gd": [0.1, 3, 0.4, 10, 1], "gd + reg1": [0.09, 2.7, 0.36, 9.1, 0.9]}, []),  # apart by their ratio
        ({"gd": seeds(1.0), "gd + reg1": seeds(1.0, seed=1)}, ["gd + reg1: makes no difference"]),
        ({"gd": seeds(2.3), "gd + reg1": seeds(2.306)}, ["gd + reg1: makes no difference"]),  # worse, by 0.3 %
        ({"gd": seeds(2.3), "gd + reg1": seeds(2.369)}, ["gd + reg1: ends worse than plain"]),  # by 3 %
        ({"gd": seeds(1.0), "sgd 4": seeds(1.0, seed=1)}, []),  # alike, as seeds enough say
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


def test_an_experiment_that_was_stopped_is_not_judged(tmp_path):
    folder = experiment_folder(tmp_path, {"gd": [1.0, 1.1, 0.9]})
    whole = diagnose(folder)
    (folder / "summary.md").unlink()
    (*found, last) = diagnose(folder)
    assert found == whole and last.signature == "cannot be judged" and "has not come to its end" in last.seen
    assert "goes on by the same command" in str(last)
