"""The README's Python runs as it stands, top to bottom, and its commands are ones that there are."""

import re
from pathlib import Path

import pytest
import torch

from bootgrad import cli

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_the_python_blocks_run_one_after_the_other(capsys):
    torch.manual_seed(0)
    names = {}
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 7
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)  # noqa: S102 — our own file
    stats, G = names["stats"], names["G"].materialize()
    rows = torch.cat([g.flatten(1) for g in G.values()], dim=1).detach()
    assert rows.shape == (32, sum(p.numel() for p in names["model"].parameters()))
    gamma = (rows - rows.mean(0)).square().sum(1).mean()
    assert float(names["G"].covariance_trace().detach()) == pytest.approx(float(gamma), rel=1e-4)
    assert names["sequences"].sq_norms.shape == (5,) and float(names["sequences"].covariance_trace) > 0
    assert stats.covariance_trace > 0 and names["report"].reg1 > 0
    assert "bootgrad agrees with plain autograd on 4 samples" in capsys.readouterr().out
    patches = torch.nn.functional.unfold(names["x"], 3, padding=1)
    windows = torch.einsum("bot,bit->boi", names["gy"].flatten(2), patches)
    torch.testing.assert_close(names["s"], windows.square().sum((1, 2)), rtol=1e-4, atol=0)


def test_the_commands_exist():
    commands = [line.partition("#")[0].split() for line in re.findall(r"^bootgrad .*$", README, re.MULTILINE)]
    assert {words[1] for words in commands} == {"train", "compare", "plan", "info"}
    for words in commands:
        assert callable(cli._parser().parse_args(words[1:]).run)


def test_links_lead_to_files():
    targets = re.findall(r"\]\(([^)#:]+)\)", README)
    assert "docs/images/comparison.png" in targets and "LICENSE" in targets
    for target in targets:
        assert (Path(__file__).parents[1] / target).is_file(), target
