import matplotlib.image
import pytest

from bootgrad.cli import main
from bootgrad.experiments import conduct, idealized
from bootgrad.experiments.study import RESULTS, Options
from bootgrad.experiments.table import Table


@pytest.mark.parametrize("name", conduct.EXPERIMENTS)
def test_every_experiment_has_all_its_parts(name):
    module = conduct.find(name)
    assert module.TITLE and module.SECTION and module.ABOUT.strip() and "seed" in module.COLUMNS
    assert all(callable(getattr(module, part)) for part in ("run", "claims", "tables", "draw"))
    with open(module.__file__, encoding="utf-8") as file:
        assert len(file.readlines()) <= 250


def test_the_list_names_them_all(capsys):
    assert main(["experiment", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(conduct.EXPERIMENTS)


def test_an_unknown_experiment_is_told_the_others(capsys, tmp_path):
    assert main(["experiment", "alchemy", "--out", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert "there is no experiment 'alchemy': take one of idealized" in message
    assert not (tmp_path / "out").exists()


def test_images_are_refused_where_there_are_none(capsys, tmp_path):
    assert main(["experiment", "idealized", "--data", "digits", "--out", str(tmp_path / "out")]) == 2
    assert "idealized is not about images: leave --data digits out" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_interruption_says_how_to_go_on(monkeypatch, capsys, tmp_path):
    def interrupted(study):
        raise KeyboardInterrupt

    monkeypatch.setattr(idealized, "run", interrupted)
    assert main(["experiment", "idealized", "--out", str(tmp_path)]) == 130
    assert f"go on with the same options; {tmp_path} holds what has been run" in capsys.readouterr().err
    assert main(["experiment", "idealized", "--overwrite", "--out", str(tmp_path)]) == 130
    assert "go on with the same options, without --overwrite" in capsys.readouterr().err


def test_what_is_written(monkeypatch, capsys, tmp_path):
    def quick(study):
        for method in idealized.METHODS:
            setting = {"stage": "final", "method": method, "lr": 0.1, "strength": 0.1}
            study.rows(setting, lambda s=setting: idealized.evaluate(s["method"], study.seeds, s, 8, 3))

    monkeypatch.setattr(idealized, "run", quick)
    assert main(["experiment", "idealized", "--seeds", "2", "--out", str(tmp_path)]) == 0
    page = (tmp_path / "summary.md").read_text()
    assert page in capsys.readouterr().out
    assert page.startswith("# idealized: ") and page.count("| **") == len(idealized.claims(stored(tmp_path)))
    assert "`bootgrad experiment idealized --seeds 2`" in page
    assert matplotlib.image.imread(tmp_path / "figure.png").std() > 0


def stored(folder):
    return Table.read(folder / RESULTS, idealized.COLUMNS)


def test_markdown_and_durations():
    assert conduct.markdown(("a", "b"), [(1, 2.5)]) == "| a | b |\n| --- | ---: |\n| 1 | 2.5 |"
    assert [conduct._duration(s) for s in (5, 300, 9000)] == ["5 seconds", "5 minutes", "2.5 hours"]


@pytest.mark.slow
def test_a_study_of_idealized_losses(tmp_path):
    conduct.conduct(Options("idealized", seeds=4, threads=1), tmp_path)
    verdicts = {claim.text: claim.verdict for claim in idealized.claims(stored(tmp_path))}
    assert verdicts["sgd 4 ends at a lower test loss than gd"] == "holds"
    assert verdicts["sgd 4 ends at a lower test loss than noisy gd"] == "holds"
