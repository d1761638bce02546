"""The comparison with other libraries: a wrong or missing one is told, and ours is right in every layer case."""

import csv
import importlib
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from bootgrad.errors import DataError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def peers(monkeypatch):
    """A module of benchmarks.peers by name."""
    monkeypatch.syspath_prepend(str(ROOT))
    return lambda name: importlib.import_module(f"benchmarks.peers.{name}")


@pytest.fixture
def softmax_regression():
    torch.manual_seed(0)
    return nn.Linear(5, 3), torch.randn(4, 5), torch.randint(3, (4,))


def test_the_oracle_on_a_model_whose_gradients_are_known(peers, softmax_regression):
    model, x, y = softmax_regression
    expected = peers("oracle").expect(model, x, y)
    weight, bias = model.weight.detach().double(), model.bias.detach().double()

    def matrix(weight):
        gy = (x.double() @ weight.t() + bias).softmax(1) - nn.functional.one_hot(y, 3)
        return torch.cat([torch.einsum("bo,bi->boi", gy, x.double()).flatten(1), gy], 1)

    def gamma(G):
        return float((G - G.mean(0)).square().sum(1).mean())

    G = matrix(weight)
    torch.testing.assert_close(expected.values["norms"], G.square().sum(1), rtol=1e-12, atol=0)
    torch.testing.assert_close(expected.grads["norms"], G.mean(0), rtol=1e-12, atol=0)
    assert float(expected.values["variance"]) == pytest.approx(gamma(G), rel=1e-12)
    c = torch.cat(
        [t.detach().double().flatten() for t in peers("ways").center(dict(model.named_parameters())).values()]
    )
    assert float(c.norm()) == pytest.approx(1, rel=0.5)
    assert float(expected.values["reg2"]) == pytest.approx(float((G.mean(0) - c).square().sum()), rel=1e-12)

    direction = torch.arange(15.0, dtype=torch.float64).view(3, 5) / 15
    quotient = (gamma(matrix(weight + 1e-5 * direction)) - gamma(matrix(weight - 1e-5 * direction))) / 2e-5
    part = (expected.grads["reg1"] - G.mean(0))[:15] / peers("ways").STRENGTH
    assert float(part @ direction.flatten()) == pytest.approx(quotient, rel=1e-7)
    assert model.weight.dtype == torch.float32 and model.weight.grad is None


def test_a_wrong_value_a_wrong_gradient_and_a_failure_are_told_apart(peers, softmax_regression):
    oracle, ways = peers("oracle"), peers("ways")
    model, x, y = softmax_regression
    expected = oracle.expect(model, x, y)

    def spoiled(value=1.0, grad=1.0, quantity="norms"):
        def make(model, x, y):
            step = ways.bootgrad_statistics(model, x, y)

            def wrong():
                found = step()
                model.weight.grad *= grad
                model.bias.grad *= grad
                return {quantity: value * found["norms"]}

            return wrong

        return oracle.examine(ways.Way("peer", (quantity,), make), model, x, y, expected)[quantity]

    right = spoiled()
    assert right.status == "right" and right.error < 1e-5
    for of_value, of_grad in ((1.01, 1), (1, 1.01)):
        outcome = spoiled(of_value, of_grad)
        assert outcome.status == "wrong" and outcome.error == pytest.approx(0.01, rel=0.01)
    assert spoiled(value=math.nan).status == spoiled(grad=math.nan).status == "wrong"
    assert spoiled(quantity="variance").status == "wrong"  # B numbers in place of one

    def failing(model, x, y):
        raise RuntimeError("no such layer\nand more")

    outcomes = oracle.examine(ways.Way("peer", ("norms", "variance"), failing), model, x, y, expected)
    assert set(outcomes) == {"norms", "variance"}
    assert {(o.status, o.error, o.why) for o in outcomes.values()} == {("refuses", None, "RuntimeError: no such layer")}
    assert model.weight.grad is None


def test_a_penalty_s_error_is_measured_against_the_penalty(peers, softmax_regression):
    oracle, ways = peers("oracle"), peers("ways")
    model, x, y = softmax_regression
    expected = oracle.expect(model, x, y)

    def without_penalty(model, x, y):
        step = ways.bootgrad_statistics(model, x, y)
        return lambda: {"reg1": step()["variance"]}

    outcome = oracle.examine(ways.Way("peer", ("reg1",), without_penalty), model, x, y, expected)["reg1"]
    assert outcome.status == "wrong" and outcome.error == pytest.approx(1, rel=1e-3)
    for way in ways.WAYS:
        if way.peer in ("bootgrad", "vmap", "hand"):
            found = oracle.examine(way, model, x, y, expected)
            assert {o.status for o in found.values()} == {"right"}, (way.name, found)


def test_a_missing_library_has_an_entry_that_says_so(peers, softmax_regression, monkeypatch):
    oracle, ways, rows = peers("oracle"), peers("ways"), peers("rows")
    for name in ("opacus", "opacus.grad_sample", "backpack", "torchjd", "torchjd.autogram"):
        monkeypatch.setitem(sys.modules, name, None)
    expected = oracle.expect(*softmax_regression)
    missing = [way for way in ways.WAYS if way.peer in ways.PACKAGES]
    assert len(missing) == 6
    for way in missing:
        for quantity, outcome in oracle.examine(way, *softmax_regression, expected).items():
            row = rows.judged("case", way.peer, quantity, outcome)
            assert row["status"] == "refuses" and row["error"] == ""
            assert row["why"].startswith("ModuleNotFoundError: ")
            assert not rows.is_fault(row)


def test_a_failing_step_costs_itself_and_a_slow_one_has_its_share(peers):
    left = [0.5, 0.5]

    def failing():
        if not left:
            raise MemoryError("can't allocate\nmemory")
        return left.pop()

    steps = {"quick": lambda: 0.001, "slow": lambda: 30.0, "failing": failing}
    times, failures = peers("measuring").take_turns(steps, rounds=9, seconds=60)
    assert times["quick"] == dict.fromkeys(range(9), 1.0)
    assert times["slow"] == dict.fromkeys(range(2), 30_000.0)
    assert failures == {"failing": "MemoryError: can't allocate"}


def test_images_of_a_file_take_the_place_of_random_numbers(peers, tmp_path):
    prepare, rng = peers("measuring").prepare, np.random.default_rng(0)

    def save(name, shape, count=64):
        x, y = rng.integers(0, 256, (count, *shape), dtype=np.uint8), np.arange(count) % 10
        np.savez(tmp_path / name, x_train=x, y_train=y, x_test=x[:2], y_test=y[:2])
        return str(tmp_path / name), x, y

    path, pixels, labels = save("right.npz", (32, 32, 3))
    _, x, y = prepare("vgg", path)
    standard = (pixels - pixels.mean((0, 1, 2))) / pixels.std((0, 1, 2))
    torch.testing.assert_close(x.double(), torch.from_numpy(standard).permute(0, 3, 1, 2), rtol=0, atol=1e-5)
    assert y.tolist() == labels.tolist()
    assert prepare("mlp", path)[1].shape == (128, 1, 28, 28)
    for name, shape, count in (("grey.npz", (32, 32), 64), ("few.npz", (32, 32, 3), 63)):
        with pytest.raises(DataError, match=f"at least 64 training images .* has {count} of shape"):
            prepare("vgg", save(name, shape, count)[0])


def test_rows_tables_and_picture(peers, tmp_path):
    rows, page, chart, outcome = peers("rows"), peers("page"), peers("chart"), peers("oracle").Outcome
    place = {"network": "mlp", "data": "random", "batch": "8"}
    plain, memory = {"0": 10.0, "1": 20.0, "2": 10.0, "3": 9.0}, (3 * 2**20, 2 * 2**20)
    timings = [
        rows.timed(place, "plain", "plain", outcome("right"), plain, plain, (memory[1],) * 2),
        rows.timed(
            place, "bootgrad", "norms", outcome("right", 1e-7), {"0": 11.0, "1": 24.0, "2": 12.0}, plain, memory
        ),
        rows.timed(place, "backpack", "norms", outcome("wrong", 0.25)),
        rows.timed(place, "torchjd", "norms", outcome("refuses", why="ValueError: a | b")),
    ]
    rows.write(tmp_path / "peers.csv", timings)
    assert rows.read(tmp_path / "peers.csv") == timings
    assert rows.read(tmp_path / "absent.csv") == []
    other = [row | {"network": "vgg"} for row in timings]
    again = [row | {"batch": "9"} for row in timings]
    assert rows.merged([*other, *timings], again, ["mlp", "vgg"]) == [*again, *other]
    ours = timings[1]
    assert (ours["ratio"], ours["rounds"], ours["milliseconds"]) == ("1.20", "3", "12.0")
    assert (ours["memory_mib"], ours["memory_ratio"]) == ("3", "1.50")

    judgements = [
        rows.judged("tied", "bootgrad", "norms", outcome("right", 0.0)),
        rows.judged("tied", "backpack", "norms", outcome("wrong", 0.5)),
        rows.judged("tied", "backpack", "variance", outcome("right", 0.0)),
        rows.judged("tied", "opacus", "norms", outcome("refuses", why="NotImplementedError: tying")),
    ]
    text = page.render(timings, judgements, "peers.png")
    lines = text.splitlines()
    cells = {line.split("|")[1].split()[0]: line for line in lines if line.startswith("| ") and line[2] not in " -"}
    assert "| tied | right | refuses | – | **wrong**: norms 5.0e-01; right: Γ |" in text
    assert "- tied: opacus NotImplementedError: tying" in lines
    assert any(line.startswith("| bootgrad") and "1.20 (1.50) | – | – | – |" in line for line in lines)
    assert any(line.startswith("| backpack") and "**wrong** (2.5e-01)" in line for line in lines)
    assert sum(line.startswith("Provisional: ") for line in lines) == 1
    assert rows.is_provisional(timings) and not rows.is_provisional([row | {"rounds": "9"} for row in timings])
    assert "- torchjd, norms: ValueError: a | b" in lines and "hand" in cells

    faults = [
        rows.judged("c", "bootgrad", "norms", outcome("wrong", 0.5)),
        rows.judged("c", "bootgrad", "norms", outcome("refuses", why="KeyError: 'x'")),
    ]
    own = rows.judged("c", "bootgrad", "norms", outcome("refuses", why="UnsupportedError: batch norm"))
    assert all(map(rows.is_fault, faults)) and not any(map(rows.is_fault, [own, *timings, *judgements]))
    chart.draw(timings, tmp_path / "peers.png")
    assert (tmp_path / "peers.png").read_bytes().startswith(b"\x89PNG")


def test_bootgrad_is_right_in_every_layer_case(tmp_path):
    done = run("--networks", "", "--out", str(tmp_path), "--page", str(tmp_path / "peers.md"))
    assert done.returncode == 0, done.stdout + done.stderr
    with (tmp_path / "peers_correctness.csv").open(newline="", encoding="utf-8") as file:
        found = list(csv.DictReader(file))
    ours = [row for row in found if row["peer"] == "bootgrad"]
    assert len({row["case"] for row in ours}) == 14
    assert len(ours) == 14 * 4
    assert {row["status"] for row in ours} == {"right"}
    assert max(float(row["error"]) for row in ours) < 1e-12
    assert {row["status"] for row in found if row["peer"] == "hand"} == {"right"}
    assert "| tied weights | right |" in (tmp_path / "peers.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_network_end_to_end(tmp_path):
    done = run("--quick", "--networks", "mlp", "--out", str(tmp_path), "--page", str(tmp_path / "peers.md"))
    assert done.returncode == 0, done.stdout + done.stderr
    with (tmp_path / "peers.csv").open(newline="", encoding="utf-8") as file:
        found = {(row["peer"], row["quantity"]): row for row in csv.DictReader(file)}
    for quantity in ("norms", "variance", "reg1", "reg2"):
        row = found["bootgrad", quantity]
        assert row["status"] == "right" and row["rounds"] == "1"
        # How long a step takes is the machine's affair; of one round the ratio follows from the times, to their rounding.
        own, plain = (float(r["milliseconds"]) for r in (row, found["plain", "plain"]))
        assert own > 0 and float(row["ratio"]) == pytest.approx(own / plain, rel=0.03, abs=0.006)
        assert float(row["memory_ratio"]) > 0.5
    assert found["bootgrad", "norms"]["ratio"] == found["bootgrad", "variance"]["ratio"]
    assert float(found["vmap", "norms"]["memory_ratio"]) > 5
    if importlib.util.find_spec("opacus") is None:
        assert found["opacus", "norms"]["why"] == "ModuleNotFoundError: No module named 'opacus'"
    assert (tmp_path / "peers.png").stat().st_size > 10_000


def run(*arguments):
    """The finished command."""
    command = [sys.executable, "-m", "benchmarks.peers", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
