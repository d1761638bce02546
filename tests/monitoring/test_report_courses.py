"""What a tile says is the end of its curve, what is smoothed is called so, and what has no place in a chart is told of."""

import json
import math
import re

import pytest

from bootgrad.errors import ArgumentError, DataError
from bootgrad.monitoring import CSVWriter, JSONLWriter, Outlier
from bootgrad.monitoring.report import report, write_report
from bootgrad.monitoring.report.courses import left_out, smoothed
from bootgrad.monitoring.report.markup import number
from bootgrad.training.figures import smooth

from .folders import compare_folder, experiment_folder, monitor_folder, train_folder
from .pages import Page
from .runs import observation

LOST = "because the averaged estimate of the gradient's squared norm is not positive: the gradient is lost in the noise"


def written(folder, observations, kind="jsonl"):
    writer = (JSONLWriter if kind == "jsonl" else CSVWriter)(folder / f"monitor.{kind}")
    for one in observations:
        writer.write(one)
    writer.close()
    return Page(report(folder))


def tile(page, name):
    """Value, and what is beside it."""
    k = page.texts.index(name)
    return page.texts[k + 1], page.texts[k + 2]


def line(page, title, name):
    """A chart's words about a line."""
    label = next(svg["aria-label"] for svg in page.all("svg") if svg.get("aria-label", "").startswith(f"{title}. "))
    return re.search(rf"(?<=[. ]){re.escape(name)}: (\S+) at \S+, (\S+) at ", label).groups()


@pytest.mark.parametrize(
    ("make", "loss", "averaged"),
    [
        (train_folder, ("Training loss", "training"), "averaged over steps"),
        (monitor_folder, ("Loss", "loss"), "averaged over observations"),
        (lambda path: monitor_folder(path, kind="csv"), ("Loss", "loss"), "averaged over observations"),
    ],
)
def test_tiles_tell_the_ends_of_curves(tmp_path, make, loss, averaged):
    page = Page(report(make(tmp_path / "run")))
    curves = (
        (loss[0], "Loss", f"{loss[1]}, smoothed", "smoothed"),
        ("Γ", "Covariance trace Γ", "Γ, smoothed", "smoothed"),
        ("Noise scale", "Gradient noise scale", averaged, averaged),
    )
    for name, title, curve, how in curves:
        value, beside = tile(page, name)
        first, last = line(page, title, curve)
        assert value == last and beside.startswith(f"{how}, at the beginning "), name
        assert beside.endswith(("∞", first))  # which has no place in a curve


def test_a_noise_scale_is_not_averaged_again(tmp_path):
    assert tile(Page(report(train_folder(tmp_path / "run"))), "Noise scale")[0] == "149"  # 30 + k, of the last step


def test_smoothed_is_what_has_enough_values_that_are_finite():
    points = [(float(k), 1.0 + k) for k in range(10)]
    assert smoothed(points) == list(zip(range(10), smooth([1.0 + k for k in range(10)]), strict=True))
    assert smoothed(points[:9]) is None and smoothed([*points, (10.0, math.inf)]) is None


@pytest.mark.parametrize("count", [1, 2, 9])
def test_few_observations_are_not_smoothed(tmp_path, count):
    page = written(tmp_path, [observation(k, trace=2.0 + k, loss=3.0 - k / 8) for k in range(count)])
    assert not any("smoothed" in text for text in page.texts)
    first = f", at the beginning {number(2.0, 3)}" if count > 1 else ""
    assert tile(page, "Γ") == (number(1.0 + count, 3), f"of the last batch{first}")
    assert {"Γ, each batch", "loss, each batch"} <= set(page.texts)
    if count == 1:  # of which a line shows nothing
        assert {"dots c0", "dots c2", "dots c3"} <= {path["class"] for path in page.all("path") if "class" in path}
        assert "1 observation, of step 0." in page.texts


def test_few_steps_are_not_smoothed(tmp_path):
    folder = train_folder(tmp_path / "run", steps=8)
    assert not any("smoothed" in text for text in Page(report(folder)).texts)
    train_folder(tmp_path / "other", steps=200)
    found = Page(report(tmp_path)).texts  # runs beside each other are alike
    assert "Training loss, each batch" in found and "The runs at their end" in found
    found = Page(report(compare_folder(tmp_path / "long"))).texts
    assert {"Training loss, smoothed", "The runs at their end; smoothed: training loss and Γ"} <= set(found)


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_a_chart_says_what_noise_scales_it_leaves_out(tmp_path, kind):
    scales = [None, math.inf, math.inf, 20.0, math.inf, 30.0, 40.0]
    page = written(tmp_path, [observation(k, noise_scale=scale) for k, scale in enumerate(scales)], kind)
    note = (
        f"Not drawn, of 7 observations: 3 at which it is infinite, {LOST}; 1 at which it is not known: it takes a batch of two "
        "samples or more whose Γ is known and not zero."
    )
    assert page.texts.count(note) == 1
    assert page.texts.index("Gradient noise scale") < page.texts.index(note) < page.texts.index("‖ḡ‖², each batch")
    noise = [path for path in page.all("path") if path.get("class", "").endswith(" c3")]
    assert [path["class"] for path in noise[:2]] == ["line c3", "dots c3"]  # the value between two gaps is there
    k = page.texts.index("Gradient noise scale: numbers")
    assert page.texts[k + 8 : k + 15] == ["averaged over observations", "20", "40", "20", "40", "3", "4"]


def test_a_chart_without_a_noise_scale_says_why(tmp_path):
    page = written(tmp_path, [observation(k, noise_scale=math.inf) for k in range(3)])
    k = page.texts.index("Gradient noise scale")
    assert page.texts[k + 1] == f"Not drawn, of 3 observations: 3 at which it is infinite, {LOST}."
    assert tile(page, "Noise scale")[0] == "∞"
    assert left_out([1.0, 2.0], "steps") == ""


def test_runs_side_by_side_say_whose_noise_scale_is_left_out(tmp_path):
    folder = compare_folder(tmp_path / "runs")
    text = (folder / "plain" / "run.csv").read_text().replace(",30,", ",inf,", 1)
    (folder / "plain" / "run.csv").write_text(text)
    assert f"plain: Not drawn, of 120 steps: 1 at which it is infinite, {LOST}." in Page(report(folder)).texts


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
@pytest.mark.parametrize("other", [{}, {"reg2": 0.0}])
def test_a_penalty_that_was_not_asked_for_is_left_out(tmp_path, other, kind):
    """Though a report measures it."""
    seen = [observation(k, reg2=0.5, strengths={"reg1": 0.1, **other}) for k in range(12)]
    page = written(tmp_path, seen, kind)
    assert "Penalties, without λ" in page.texts and "reg1" in page.texts and "λ of reg1 is 0.1." in page.texts
    assert "reg2" not in page.texts and "Strengths of the penalties" not in page.texts


def test_samples_without_names_are_no_others_of_the_same_number(tmp_path):
    seen = [observation(k, outliers=(Outlier(None, 5.0 + k, 3), Outlier("a", 2.0, 4))) for k in range(3)]
    page = written(tmp_path, seen)
    k = page.texts.index("a")
    assert page.texts[k : k + 4] == ["a", "3", "2", "2"]
    for step in range(3):
        k = page.texts.index(f"number 3 in the batch of step {step}")
        assert page.texts[k + 1 : k + 4] == ["1", str(5 + step), str(step)]


def test_a_part_of_the_model_is_told_of_as_such(tmp_path):
    words = "Watched: normalization. All but the loss is of these parameters alone."
    assert words in written(tmp_path / "part", [observation(0, watched=("normalization",))]).texts
    assert not any("Watched" in text for text in written(tmp_path / "whole", [observation(0)]).texts)


def test_what_runs_were_run_on_is_told_once_where_it_is_the_same(tmp_path):
    folder = compare_folder(tmp_path / "runs")

    def header():
        page = Page(report(folder))
        return page.texts[page.texts.index("What it was run on") + 1 :]

    assert header()[:2] == ["what", "value"]
    path = folder / "reg1" / "run.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"versions": {"torch": "2.11.0"}}))
    assert header()[:4] == ["what", "plain", "reg1", "reg1_reg2"]
    folder = experiment_folder(tmp_path / "experiment")
    assert header()[:6] == ["what", "2026-01-01", "2026-01-01", "torch", "2.11.0", "2.13.0"]


def test_a_folder_above_a_monitors_says_where_it_is(tmp_path):
    written(tmp_path / "run", [observation(0)])
    with pytest.raises(DataError, match="none is there: give .*run, which has one"):
        report(tmp_path)


def test_a_page_does_not_take_the_place_of_what_it_is_made_of(tmp_path):
    path = tmp_path / "monitor.html"
    writer = JSONLWriter(path)
    writer.write(observation(0))
    writer.close()
    before = path.read_bytes()
    for out in (None, path):
        with pytest.raises(ArgumentError, match="is no page: choose another file"):
            write_report(path, out)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "values",
    [
        (1.0, 1e300),
        (-1.7e308, 1.7e308),
        (5e-324, 1e-323, 1.5e-323),
        (1e-300, 1.0),
        (0.0, 1e-320),
        (1.0, math.inf, math.nan),
    ],
)
def test_numbers_at_the_ends_of_float64_make_a_page(values, tmp_path):
    assert "Loss" in written(tmp_path, [observation(k, loss=value) for k, value in enumerate(values)]).texts


def test_penalties_that_were_asked_for_are_there(tmp_path):
    none = written(tmp_path / "none", [observation(k, strengths={"reg1": 0.0, "reg2": 0.0}) for k in range(12)])
    assert "Penalties, without λ" not in none.texts
    rising = [observation(k, reg2=0.5, strengths={"reg1": 0.1} | ({"reg2": k / 10} if k else {})) for k in range(12)]
    page = written(tmp_path / "rising", rising)
    assert {"reg1", "reg2", "λ of reg2", "λ of reg1 is 0.1."} <= set(page.texts) and "λ of reg1" not in page.texts
    assert line(page, "Strengths of the penalties", "λ of reg2") == ("0", "1.1")
    center = written(tmp_path / "center", [observation(k, reg2=0.5, strengths={}) for k in range(12)])
    assert {"reg1", "reg2"} <= set(center.texts)  # of a center that was given to record.backward


def test_of_runs_side_by_side_those_with_a_penalty_have_it(tmp_path):
    folder = compare_folder(tmp_path / "runs")
    for name in ("plain", "reg1"):
        table = folder / name / "run.csv"
        table.write_text(table.read_text().replace(",,0.01,", ",0.5,0.01,"))  # Reg2 is reported where λ₂ is 0, too
    page = Page(report(folder))
    assert "Reg1, without λ₁, smoothed" in page.texts and not any("Reg2" in text for text in page.texts)
    label = next(svg["aria-label"] for svg in page.all("svg") if svg.get("aria-label", "").startswith("Reg1"))
    assert "reg1: " in label and "plain: " not in label
