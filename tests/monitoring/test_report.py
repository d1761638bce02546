"""The page of a folder: what is in it, that it is well formed, and that nothing of it is markup from outside."""

import json
import math
import re

import pytest

from bootgrad.errors import DataError
from bootgrad.monitoring import CSVWriter, Flag, JSONLWriter, LayerObservation, Observation
from bootgrad.monitoring.report import report, write_report
from bootgrad.monitoring.report.markdown import html
from bootgrad.monitoring.report.markup import Markup, element, number, table
from bootgrad.monitoring.spikes import Spikes
from bootgrad.training import checkpoint

from .folders import HOSTILE, compare_folder, experiment_folder, monitor_folder, train_folder
from .pages import Page

NOTHING = "No quantity was far above its last values, from the 11th observation on."
FOLDERS = {
    "train": train_folder,
    "compare": compare_folder,
    "experiment": experiment_folder,
    "monitor": monitor_folder,
    "csv": lambda path: monitor_folder(path, kind="csv"),
    "both": lambda path: monitor_folder(train_folder(path)),
}


@pytest.fixture(params=FOLDERS)
def folder(request, tmp_path):
    return FOLDERS[request.param](tmp_path / "run")


def test_every_page_is_well_formed(folder):
    text = report(folder)
    page = Page(text)
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    for _, attrs in page.elements:
        assert attrs.get("aria-labelledby", ids[0]) in ids
        if attrs.get("href") is not None:
            assert attrs["href"].startswith("#") and attrs["href"][1:] in ids
        assert not any(name.startswith("on") for name in attrs)
    assert not page.all("script") and not page.all("link") and page.all("html") == [{"lang": "en"}]
    assert all(attrs["src"].startswith("data:image/png;base64,") and attrs["alt"] for attrs in page.all("img"))
    levels = page.headings()
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(b - a <= 1 for a, b in zip(levels, levels[1:], strict=False))
    assert len(page.all("table")) == len(page.all("caption")) >= 1
    for svg in page.all("svg"):
        assert svg.get("aria-hidden") == "true" or (svg["role"] == "img" and len(svg["aria-label"]) > 10)
    policy = next(attrs["content"] for attrs in page.all("meta") if attrs.get("http-equiv"))
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert "nan" not in re.findall(r"[a-z]+", "".join(d["d"] for d in page.all("path")).lower())


def texts(folder):
    return Page(report(folder)).texts


def test_a_run_of_train(tmp_path):
    page = Page(report(train_folder(tmp_path / "first run")))
    found = page.texts
    for words in (
        "bootgrad train",
        "first run",
        "Findings",
        "Course of the run",
        "Covariance trace Γ",
        "Reg1, without λ₁",
        "89930",
    ):
        assert words in found, words
    assert "λ is 0.01." in found and "2×" in found and "of a plain step" in found
    assert "Reg2, without λ₂" not in found
    assert "120 steps on digits, batches of 32, adam at 0.001." in found
    k = found.index("The run at the end of each epoch")
    assert (
        found[k + 8 : k + 10] == ["1", "30"] and found[k + 11].endswith(" %") and found[k + 15 : k + 17] == ["2", "60"]
    )
    labels = [svg["aria-label"] for svg in page.all("svg") if "aria-label" in svg]
    assert any(label.startswith("Loss. training, smoothed: ") and "test images: " in label for label in labels)


def test_findings_are_those_of_diagnose(tmp_path):
    folder = train_folder(tmp_path / "run", last=0.1)
    assert "No signature of failure was found by bootgrad diagnose." in texts(folder)
    bad = train_folder(tmp_path / "bad", last=100.0)
    found = texts(bad)
    assert 'class="finding"' in report(bad) and 'class="finding unjudged"' not in report(bad)
    k = found.index("does not learn")
    assert found[k + 1] == "Seen:" and "at the beginning" in found[k + 2] and found[k + 3] == "Meaning:"


def test_what_cannot_be_judged_is_no_fault(tmp_path):
    page = Page(report(train_folder(tmp_path / "run", steps=8)))
    assert "cannot be judged" in page.texts and page.texts.count("Seen:") == 1
    assert [d["class"] for d in page.all("div") if d.get("class", "").startswith("finding ")] == ["finding unjudged"]


def test_runs_side_by_side(tmp_path):
    found = texts(compare_folder(tmp_path / "runs"))
    assert "bootgrad compare" in found and "3 runs of up to 120 steps each: plain, reg1, reg1_reg2." in found
    assert "Lowest test loss at the end" in found and "of reg1" in found
    assert found.count("reg1_reg2") > 4  # in legends and tables
    assert "Settings" in found and "Runs at their end" in found


def test_an_experiment(tmp_path):
    page = Page(report(experiment_folder(tmp_path / "out")))
    found = page.texts
    assert "6 rows of results, 3 seeds, in its quick form." in found
    k = found.index("both are")
    assert found[k : k + 5] == ["both are", "alike", ", as", "sgd", "is over two lines"]
    assert {"0.5 [0.25, 0.75]", "holds", "Rows of results.csv (6)", "one link"} <= set(found)
    assert len(page.all("img")) == 1  # of the folder's own
    (tmp_path / "out" / "summary.md").unlink()
    assert "The experiment has not come to its end, which writes a summary." in texts(tmp_path / "out")


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_what_a_monitor_has_written(tmp_path, kind):
    found = texts(monitor_folder(tmp_path / "run", kind=kind))
    assert "40 observations of steps 0 to 1950." in found
    k = found.index("What each layer's parameters have of Γ, the largest share first")
    assert found[k + 7] == "block.conv" and "75.0 %" in found and "25.0 %" in found
    assert {"Norms of the samples' gradients", "quartiles", "Γ by layer", "Gradient noise scale"} <= set(found)
    if kind == "jsonl":  # which alone has names
        k = found.index("Samples whose gradient was far longer than those of their batch")
        assert found[k + 5 : k + 9] == ["image 7", "40", "89", "1950"]
        k = found.index("Steps at which something was far above its last values, the latest first")
        assert found[k + 5 : k + 9] == ["1900", f"Γ {number(900 * math.exp(-3.8), 3)}", "block.conv", "6.71×"]
    else:
        assert any(text.startswith("Steps at which something was far above its last values: 1900. ") for text in found)
        assert NOTHING not in found
    for name, value in (("Steps with flags", "1"), ("Outlying samples", "60")):
        assert found[found.index(name) + 1] == value


@pytest.mark.parametrize(("writer_of", "kind"), [(CSVWriter, "csv"), (JSONLWriter, "jsonl")])
def test_reports_say_nothing_of_outliers(tmp_path, writer_of, kind):
    """For they have no norms of samples."""
    writer = writer_of(tmp_path / f"monitor.{kind}")
    for step in range(12):
        writer.write(Observation(step, 4, covariance_trace=1.0))
    writer.close()
    found = texts(tmp_path)
    assert "Outlying samples" not in found and NOTHING in found


@pytest.mark.parametrize(("count", "are_judged"), [(2, False), (10, False), (11, True)])
def test_flags_that_were_not_looked_for_are_no_good_news(tmp_path, count, are_judged):
    spikes = Spikes(6.0)
    flags = [spikes.take({("covariance_trace", None): 1e6 if k == count - 1 else 1.0}) for k in range(count)]
    assert bool(flags[-1]) == are_judged  # a jump of the last one would have been seen
    folder = tmp_path / "run"
    writer = JSONLWriter(folder / "monitor.jsonl")
    for step in range(count):
        writer.write(Observation(step, 4, covariance_trace=1.0))
    writer.close()
    page = Page(report(folder))
    kind, text = (
        ("finding none", NOTHING)
        if are_judged
        else (
            "finding unjudged",
            f"Nothing is compared with its last values before 10 observations; here are {count}.",
        )
    )
    assert text in page.texts and [d["class"] for d in page.all("div") if "finding " in d.get("class", "")] == [kind]
    beside = "nothing far above its last values" if are_judged else "compared after 10 observations"
    k = page.texts.index("Steps with flags")
    assert page.texts[k + 1 : k + 3] == ["0" if are_judged else "–", beside]


def test_steps_with_flags_in_a_table_are_no_good_news(tmp_path):
    page = Page(report(monitor_folder(tmp_path / "run", kind="csv")))
    assert [d["class"] for d in page.all("div") if d.get("class", "").split()[:1] == ["finding"]] == ["finding"]


def test_layers_are_by_their_share(tmp_path):
    writer = JSONLWriter(tmp_path / "monitor.jsonl")
    traces = {"a": 1.0, "b": None, "c": 6.0, "d": 3.0}
    layers = {name: LayerObservation(trace, 1.0) for name, trace in traces.items()}
    for step in range(3):
        writer.write(Observation(step, 4, covariance_trace=10.0, layers=layers))
    writer.close()
    page = Page(report(tmp_path))
    k = page.texts.index("What each layer's parameters have of Γ, the largest share first")
    rows = page.texts[k + 7 :]
    assert [text for text in rows if text in traces] == ["c", "d", "a", "b"]
    assert [text for text in rows if text.endswith(" %")] == ["60.0 %", "30.0 %", "10.0 %"]


def test_files_of_somebody_elses_are_left_out(tmp_path):
    folder = monitor_folder(tmp_path / "run")
    folder.mkdir(exist_ok=True)
    for k, line in enumerate(('{"loss": 1}', '{"step": 3, "loss": 1}', "null", '["step", "batch_size"]', "text")):
        (folder / f"train{k}.jsonl").write_text(f"{line}\n{line}\n")
    found = texts(folder)
    assert "40 observations of steps 0 to 1950." in found and not any("train" in text for text in found)


@pytest.mark.parametrize(
    "part",
    [
        {"layers": ["a"]},
        {"layers": None},
        {"layers": {"a": 1}},
        {"norms": [1]},
        {"strengths": 3},
        {"outliers": {"id": 3}},
        {"outliers": [3]},
        {"flags": None},
        {"flags": ["loss"]},
    ],
)
def test_lines_that_are_no_observations_are_told_of(tmp_path, part):
    lines = ({"step": 0, "batch_size": 4}, {"step": 1, "batch_size": 4, **part})
    (tmp_path / "monitor.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    with pytest.raises(
        DataError, match=f"line 2 of .*monitor.jsonl is no observation .{next(iter(part))} are .*remove it"
    ):
        report(tmp_path)


@pytest.mark.parametrize(("in_lines", "in_rows"), [(2, 5), (5, 5), (5, 2)])
def test_of_a_table_and_lines_of_one_name_the_further_is_shown(tmp_path, in_lines, in_rows):
    monitor_folder(tmp_path, count=in_lines)
    monitor_folder(tmp_path, count=in_rows, kind="csv")
    found = " ".join(texts(tmp_path))
    assert ("monitor.csv" in found) == (in_rows > in_lines) and f"to {50 * (max(in_lines, in_rows) - 1)}." in found


def test_a_flagged_loss_that_is_no_number(tmp_path):
    writer = JSONLWriter(tmp_path / "monitor.jsonl")
    for step, usual in ((0, None), (1, 2.0)):
        writer.write(Observation(step, 4, covariance_trace=1.0, flags=(Flag("loss", math.nan, usual),)))
    writer.close()
    found = texts(tmp_path)
    assert found.count("loss nan") == 2 and found.count("∞×") == 2


def test_interrupted_runs_side_by_side(tmp_path):
    for name in ("first", "second"):
        folder = train_folder(tmp_path / name)
        header, *lines = (folder / "run.csv").read_text().splitlines()
        (folder / "run.csv").write_text("\n".join([header, *lines[:7]]) + "\n")
    found = texts(tmp_path)
    assert "2 runs of up to 7 steps each: first, second." in found and "Lowest test loss at the end" not in found


def test_names_from_outside_are_text(tmp_path):
    folder = train_folder(tmp_path / "run", data=HOSTILE)
    monitor_folder(folder, layer=HOSTILE, sample=HOSTILE)
    hidden = experiment_folder(tmp_path / "experiment", text=f"{HOSTILE} **{HOSTILE}** `{HOSTILE}`")
    (hidden / "summary.md").write_text((hidden / "summary.md").read_text().replace("a is below b", HOSTILE))
    (folder / "<b>name").mkdir()
    for path in (folder, hidden, compare_folder(tmp_path / "<script>alert(3)<∕script>")):
        text = report(path)
        page = Page(text)
        assert not page.all("script") and not page.all("b") and "<script" not in text
        assert all(attrs["src"].startswith("data:") for attrs in page.all("img"))
        assert not any(name.startswith("on") for _, attrs in page.elements for name in attrs)
    assert HOSTILE in texts(folder)


def test_a_page_is_written_where_it_is_asked_for(tmp_path):
    folder = train_folder(tmp_path / "run")
    assert write_report(folder) == folder / "report.html"
    other = write_report(str(folder), str(tmp_path / "page.html"))
    assert other.read_text() == (folder / "report.html").read_text() == report(folder)
    with pytest.raises(DataError, match="cannot be written"):
        write_report(folder, tmp_path / "no" / "page.html")


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_a_file_of_observations_has_a_page(tmp_path, kind):
    folder = monitor_folder(train_folder(tmp_path / "run"), kind=kind)
    page = write_report(folder / f"monitor.{kind}")
    assert page == folder / "monitor.html" and not (folder / "report.html").exists()
    found = Page(page.read_text()).texts
    assert f"monitor.{kind}" in found and "40 observations of steps 0 to 1950." in found and "Epochs" not in found
    other = (folder / f"monitor.{kind}").rename(folder / "other")  # whatever it is called
    assert write_report(other, tmp_path / "page.html").read_text().count("40 observations of steps 0 to 1950.") == 1


def test_other_files_have_none(tmp_path):
    folder = train_folder(tmp_path / "run")
    (folder / "empty.jsonl").write_text("")
    (folder / "begun.jsonl").write_text('{"step": 0, "batch_size": 4, "lo')
    for name in ("run.csv", "run.json", "empty.jsonl", "begun.jsonl"):
        with pytest.raises(
            DataError, match=f"{name} has no observations .* JSONL or CSV file .* or a folder; of a run"
        ):
            write_report(folder / name)
    assert not list(folder.glob("*.html"))
    (folder / "broken.csv").write_text("step,bootgrad/loss\n1,2,3\n")
    with pytest.raises(DataError, match="broken.csv is no table of observations"):
        write_report(folder / "broken.csv")


def test_a_run_that_goes_on_has_a_page(tmp_path):
    folder = train_folder(tmp_path / "run")
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").unlink()
    checkpoint.save(folder / "checkpoint.pt", dict.fromkeys(checkpoint.KEYS) | {"settings": record["settings"]})
    found = texts(folder)
    assert "0.001" in found and "What it was run on" not in found


def test_folders_without_a_run(tmp_path):
    with pytest.raises(
        DataError, match="there is no folder or file .*nothing: give the --out of a run, or a JSONL or CSV file"
    ):
        report(tmp_path / "nothing")
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(DataError, match="JSONL or CSV file of a Monitor; none is there"):
        report(tmp_path)
    folder = train_folder(tmp_path / "run")
    for damage, message in (
        (b"step,loss\n1\n", "no whole table"),
        (b"a,b\n1,2\n", "no whole run"),
        (b"\xff\xfe", "cannot be read"),
    ):
        (folder / "run.csv").write_bytes(damage)
        with pytest.raises(DataError, match=message):
            report(folder)
    for damage in ("[]", "{", "{}"):
        whole = train_folder(tmp_path / f"run {damage}")
        (whole / "run.json").write_text(damage)
        with pytest.raises(DataError, match="run.json cannot be read|no whole run"):
            report(whole)


def test_runs_whose_loss_is_not_finite(tmp_path):
    folder = train_folder(tmp_path / "run")
    lines = (folder / "run.csv").read_text().splitlines()
    cells = lines[-1].split(",")
    (folder / "run.csv").write_text("\n".join([*lines[:-1], ",".join([*cells[:2], "inf", "", *cells[4:]])]) + "\n")
    found = texts(folder)
    assert "diverges" in found and "∞" in found


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (math.nan, "–"),
        (math.inf, "∞"),
        (-math.inf, "−∞"),
        (0.0, "0"),
        (1234.5678, "1235"),
        (123456.0, "123,500"),
        (1.5e7, "1.5·10⁷"),
        (-2.5e-6, "−2.5·10⁻⁶"),
    ],
)
def test_numbers_are_short(value, text):
    assert number(value) == text


def test_elements_escape_what_is_not_markup():
    made = element("p", "a < b", Markup("<br>"), ["&", element("b", "c")], title='"x"', data_k=1, hidden=None)
    assert made == '<p title="&quot;x&quot;" data-k="1">a &lt; b<br>&amp;<b>c</b></p>'


def test_columns_of_numbers_are_to_the_right():
    page = Page(table("t", "c", ("name", "number", "word"), [["a", 1.5, "x"], ["b", "–", "3"]]))
    assert [cell.get("class") for cell in page.all("td")] == ["n", None, "n", None]
    assert [cell.get("class") for cell in page.all("th")] == [None, "n", None, None, None]
    assert page.texts == ["c", "name", "number", "word", "a", "1.5", "x", "b", "–", "3"]


def test_markdown_of_a_summary():
    text = "# a\n\nb **c** `d`\ne\n## f\n| g | h |\n|---|---:|\n| i | 1 |\n- j\n- k\n"
    page = Page(html(text, "n", lambda *_: None))
    assert [tag for tag, _ in page.elements if tag in ("h2", "h3", "p", "ul", "li", "table", "strong", "code")] == [
        "h2", "p", "strong", "code", "h3", "table", "ul", "li", "li",
    ]  # fmt: skip
    assert (
        page.texts == ["a", "b ", "c", " ", "d", " e", "f", "f", "g", "h", "i", "1", "j", "k"] or " " not in page.texts
    )
