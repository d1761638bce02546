"""The Python of docs/theory.md shows what the page says."""

from ..docs.test_blocks import ROOT, run


def test_the_examples_show_what_they_say(capsys):
    names = run(ROOT / "docs/theory.md")
    found = names["found"]
    assert found.holds and found.curvature.low > 0
    assert found.sizes[0] > 3 * found.sizes[2]  # of the weight decay
    assert found.test_gap is not None and found.samples == 40
    assert names["bound"].steps == 30 and 0 < names["bound"].fresh_batches < names["bound"].any_order
    assert "The second-order expansion holds" in capsys.readouterr().out
