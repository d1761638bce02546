"""The Python of docs/theory.md runs as it stands."""

import re
from pathlib import Path

import torch

DOCS = Path(__file__).parents[2] / "docs/theory.md"


def test_the_examples_run_and_show_what_they_say(capsys):
    torch.manual_seed(0)
    names: dict = {}
    blocks = re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        exec(compile(block, "docs/theory.md", "exec"), names)  # noqa: S102 — our own file
    found = names["found"]
    assert found.holds and found.curvature.low > 0
    assert found.sizes[0] > 3 * found.sizes[2]  # of the weight decay
    assert found.test_gap is not None and found.samples == 40
    assert names["bound"].steps == 30 and 0 < names["bound"].fresh_batches < names["bound"].any_order
    assert "The second-order expansion holds" in capsys.readouterr().out
