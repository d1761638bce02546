"""Tables of a run, their CSV and JSON, the terminal's table and the pictures' curves."""

import csv
import math
import struct

import pytest
import torch

from bootgrad.training import figures, tables
from bootgrad.training.history import EPOCH_COLUMNS, STEP_COLUMNS, History, Table, finite

NAN = float("nan")


@pytest.fixture
def history():
    """Four steps in two epochs."""
    history = History()
    for k in range(4):
        values = (
            k + 1,
            1 + k // 2,
            2.5 / (k + 1),
            10.0**-k,
            0.1 + 0.2,
            math.inf if k == 0 else 30.0 + k,
            1 / 3,
            NAN,
            0.01,
        )
        history.steps.add(**dict(zip(STEP_COLUMNS, values, strict=True)))
        if k % 2:
            values = (1 + k // 2, k + 1, 1.75, 0.5 * k, 0.875, 0.055, 31.0, 0.02, 0.008 if k == 3 else NAN)
            history.epochs.add(**dict(zip(EPOCH_COLUMNS, values, strict=True)))
    return history


def test_csv_reads_back_to_the_same_numbers(tmp_path, history):
    history.write_csv(tmp_path / "run.csv")
    with open(tmp_path / "run.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == [*STEP_COLUMNS, "test_loss", "test_accuracy"]
    assert [row["step"] for row in rows] == ["1", "2", "3", "4"] and [row["epoch"] for row in rows] == list("1122")
    for name in ("loss", "covariance_trace", "sq_mean_norm", "noise_scale", "reg1", "seconds"):
        assert [float(row[name]) for row in rows] == history.steps[name]
    assert [row["reg2"] for row in rows] == [""] * 4
    assert [row["test_loss"] for row in rows] == ["", "0.5", "", "1.5"]
    assert [row["test_accuracy"] for row in rows] == ["", "0.875", "", "0.875"]


def test_state_round_trip_keeps_every_bit(history):
    other = History()
    other.load_state_dict(history.state_dict())
    for ours, theirs in ((history.steps, other.steps), (history.epochs, other.epochs)):
        for name, column in ours.columns.items():
            pack = struct.Struct(f"{len(column)}d").pack
            assert pack(*column) == pack(*theirs[name])


def test_a_state_with_columns_of_different_lengths_is_refused(history):
    state = history.state_dict()
    state["steps"]["loss"] = torch.zeros(3, dtype=torch.float64)
    with pytest.raises(ValueError, match="different lengths"):
        History().load_state_dict(state)


def test_epoch_rows_hold_no_number_that_json_lacks(history):
    rows = history.epoch_rows()
    assert rows[0]["epoch"] == 1 and rows[0]["plain_seconds_per_step"] is None
    assert rows[1]["plain_seconds_per_step"] == 0.008 and rows[1]["train_loss"] == 1.75
    assert [finite(v) for v in (math.inf, -math.inf, NAN, 0.0)] == [None, None, None, 0.0]


def test_a_row_needs_every_column():
    with pytest.raises(KeyError):
        Table(("a", "b")).add(a=1)


def test_cells_and_table(history):
    first, last = (tables.epoch_cells(history.epochs.row(k)) for k in (0, 1))
    assert first == ("1", "1.75", "0.5", "87.50 %", "0.055", "31", "0.02", "–", "–")
    assert last == ("2", "1.75", "1.5", "87.50 %", "0.055", "31", "0.02", "0.008", "2.50")
    text = tables.table(("run", "Γ"), [("plain", "1234.5"), ("Reg1 + Reg2", "7")])
    assert text.splitlines() == [
        "run               Γ",
        "───────────  ──────",
        "plain        1234.5",
        "Reg1 + Reg2       7",
    ]
    assert tables.number(123456.0) == "1.235e+05" and tables.number(NAN) == "–" and tables.number(math.inf) == "inf"


def test_smoothing_is_a_corrected_running_mean():
    values = [4.0, 1.0, 16.0]
    weights = [[1.0], [0.5, 1.0], [0.25, 0.5, 1.0]]
    for k, w in enumerate(weights):
        logs = sum(a * math.log(v) for a, v in zip(w, values[: k + 1], strict=True)) / sum(w)
        assert figures.smooth(values, decay=0.5)[k] == pytest.approx(math.exp(logs), rel=1e-12)
    assert figures.smooth([0.0, 3.0], decay=0.5) == pytest.approx([0.0, 2.0], rel=1e-12)


def drawn(monkeypatch, draw, *arguments):
    """The figure that a function draws, and the size of its PNG."""
    kept = []
    save = figures.save
    monkeypatch.setattr(figures, "save", lambda figure, path: (kept.append(figure), save(figure, path)))
    draw(*arguments)
    content = arguments[-1].read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    return kept[0], struct.unpack(">2I", content[16:24])


def test_the_picture_of_a_run_holds_its_numbers(monkeypatch, tmp_path, history):
    figure, size = drawn(monkeypatch, figures.draw_run, history, "title", tmp_path / "run.png")
    loss, gamma, noise = figure.axes
    curves = {line.get_label(): line.get_xydata().tolist() for line in loss.get_lines()}
    assert curves["each batch"] == [[k + 1, 2.5 / (k + 1)] for k in range(4)]
    assert curves["test images"] == [[2, 0.5], [4, 1.5]]
    assert gamma.get_lines()[0].get_ydata().tolist() == [1, 0.1, 0.01, 0.001] and gamma.get_yscale() == "log"
    assert noise.get_lines()[0].get_ydata().tolist()[1:] == [31, 32, 33]
    assert math.isnan(noise.get_lines()[0].get_ydata()[0])  # infinite: a gap
    assert [ax.get_ylabel() for ax in figure.axes] == ["nats", "loss² / parameter²", "samples"]
    assert size == (880, 990)


def test_the_comparison_draws_each_run_in_its_own_colour_and_style(monkeypatch, tmp_path, history):
    runs = {"plain": history, "Reg1": history, "Reg1 + Reg2": history}
    figure, size = drawn(monkeypatch, figures.draw_comparison, runs, "title", tmp_path / "c.png")
    for ax in figure.axes:
        looks = {(line.get_color(), line.get_linestyle()) for line in ax.get_lines()}
        assert len(looks) == len({colour for colour, _ in looks}) == 3
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(runs)
    assert figure.axes[1].get_lines()[2].get_xydata().tolist() == [[2, 0.5], [4, 1.5]]
    assert size == (1210, 825)


def test_text_of_the_comparison_does_not_overlap(monkeypatch, tmp_path, history):
    figure, _ = drawn(monkeypatch, figures.draw_comparison, {"a": history, "b": history}, "t" * 80, tmp_path / "c.png")
    renderer = figure.canvas.get_renderer()
    texts = [*figure.legends[0].get_texts(), figure._suptitle]
    for ax in figure.axes:
        ticks = [t for t in ax.get_yticklabels() if ax.get_ylim()[0] <= t.get_position()[1] <= ax.get_ylim()[1]]
        assert len(ticks) >= 3
        texts += [ax.title, ax.yaxis.label, *ticks]
    width, height = figure.get_size_inches() * figure.dpi
    boxes = [text.get_window_extent(renderer) for text in texts]
    for i, a in enumerate(boxes):
        assert 0 <= a.x0 and a.x1 <= width and 0 <= a.y0 and a.y1 <= height, texts[i]
        for k in range(i):
            assert not a.overlaps(boxes[k]), (texts[i], texts[k])


def test_a_long_title_takes_lines(monkeypatch, tmp_path, history):
    words = "word " * 60
    for draw, given in ((figures.draw_run, history), (figures.draw_comparison, {"a": history})):
        with monkeypatch.context() as context:
            figure, _ = drawn(context, draw, given, words, tmp_path / "long.png")
        renderer = figure.canvas.get_renderer()
        box, width = figure._suptitle.get_window_extent(renderer), figure.bbox.width
        assert 0 <= box.x0 and box.x1 <= width and not box.overlaps(figure.axes[0].title.get_window_extent(renderer))


def test_steps_whose_trace_is_unknown_are_left_out_of_its_curves(monkeypatch, tmp_path, history):
    traces = history.steps["covariance_trace"]
    traces[1] = traces[2] = NAN
    with monkeypatch.context() as context:
        figure, _ = drawn(context, figures.draw_run, history, "title", tmp_path / "run.png")
    each, smoothed = figure.axes[1].get_lines()
    assert each.get_xydata().tolist() == [[1, traces[0]], [4, traces[3]]]
    assert smoothed.get_ydata().tolist() == figures.smooth([traces[0], traces[3]])
    traces[:] = [NAN] * 4
    figure, _ = drawn(monkeypatch, figures.draw_comparison, {"a": history}, "title", tmp_path / "c.png")
    assert not len(figure.axes[2].get_lines()[0].get_xdata())


def test_a_run_whose_numbers_cannot_be_drawn_on_logarithmic_axes_is_drawn(tmp_path):
    history = History()
    history.steps.add(**dict.fromkeys(STEP_COLUMNS, 0.0) | {"noise_scale": NAN, "step": 1})
    figures.draw_run(history, "one step", tmp_path / "run.png")
    assert (tmp_path / "run.png").stat().st_size > 1000
