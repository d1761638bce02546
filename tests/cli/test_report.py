"""``bootgrad report``: a run's page from the command line."""

import pytest

from bootgrad.cli import main
from bootgrad.training.settings import Settings

from .commands import train


def test_the_page_of_a_run(data, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(train(data, out, "--epochs", "2", "--reg1", "0.05")) == 0
    capsys.readouterr()
    assert main(["report", str(out)]) == 0
    assert capsys.readouterr().out == f"written: {out / 'report.html'}\n"
    page = (out / "report.html").read_text(encoding="utf-8")
    for words in ("<h1>run</h1>", "8 steps on ", "Reg1, without λ₁", "λ is 0.05.", *Settings.__dataclass_fields__):
        assert words in page, words
    assert main(["report", str(out), "--out", str(tmp_path / "page.html")]) == 0
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == page


@pytest.mark.parametrize(
    ("folder", "options", "message"),
    [
        ("nothing", [], "there is no folder"),
        (".", [], "none is there"),
        ("run", ["--out", "no/page.html"], "cannot be written"),
    ],
)
def test_mistakes(folder, options, message, data, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if folder == "run":
        assert main(train(data, tmp_path / "run", "--epochs", "1")) == 0
    assert main(["report", folder, *options]) == 2
    assert message in capsys.readouterr().err
