"""Real architectures from end to end: every quantity against autograd, or the refusal that is due; and a page that tells of it.

``BOOTGRAD_WRITE_DOCS=1 pytest tests/zoo`` writes docs/zoo.md; without it, the page must be what ran.
"""

import os
import re
from pathlib import Path

import pytest
import torch
import transformers

import bootgrad

from . import language, others, vision  # noqa: F401 — they register their cases
from .architecture import CASES, B, Case, Setting
from .comparison import compare

pytestmark = pytest.mark.filterwarnings("ignore::bootgrad.BootgradWarning")
PAGE = Path(__file__).parents[2] / "docs" / "zoo.md"
WRITE = os.environ.get("BOOTGRAD_WRITE_DOCS") == "1"
HEADER = f"""# Zoo

Made by `BOOTGRAD_WRITE_DOCS=1 pytest tests/zoo`; do not edit. Small architectures with random weights, of transformers
{transformers.__version__} or written out in tests/zoo, on {B} samples: their plain gradient, per-sample norms, distances
from a center, Γ, and the gradients of Reg1 (about the batch mean and zero) and Reg2 (about a random center) are those of plain
autograd in float64, to nine digits, and by finite differences to two. A row tells how many numbers the parameters hold, how
many operations use them, and which of these have no rule of their own, so that they run one sample at a time, with a warning;
or what the error says where per-sample gradients do not exist or cannot be had.

| architecture | parameters | operations | without a rule, or refused |
| --- | --- | --- | --- |
"""
NAMES = [pytest.param(name, marks=() if case.quick else pytest.mark.slow) for name, case in CASES.items()]


@pytest.fixture(scope="session")
def page():
    """What takes a row by name: it must be on the page, which is written again if all rows are there and that is asked for."""
    written, rows = PAGE.read_text().splitlines() if PAGE.exists() else [], {}

    def take(name: str, row: str) -> None:
        rows[name] = row
        assert WRITE or row in written, f"docs/zoo.md is not what ran, which is: {row}"

    yield take
    if WRITE and rows.keys() == CASES.keys():
        PAGE.write_text(HEADER + "".join(f"{rows[name]}\n" for name in CASES))


@pytest.mark.parametrize("name", NAMES)
def test_agrees_with_autograd_or_is_refused(name, page):
    case = CASES[name]
    torch.manual_seed(0)
    setting = case.build()
    parameters = sum(p.numel() for p in setting.model.parameters() if p.requires_grad)
    if case.refusal is None:
        record = compare(setting, case.differences)
        operations, told = str(record.operations), ", ".join(record.without_rule) or "–"
    else:
        operations, told = "–", f"refused: … {refuse(case, setting)} …"
    page(name, f"| {name} | {parameters} | {operations} | {told} |")


def refuse(case: Case, setting: Setting) -> str:
    """Make sure that the setting is refused, and nothing changed; returns the part of the message that was expected."""
    with pytest.raises(bootgrad.BootgradError, match=case.refusal) as error:
        with bootgrad.record(setting.model) as rec:
            losses = setting.losses(*setting.inputs)
        rec.backward(losses)
    assert all(p.grad is None for p in setting.model.parameters())
    return re.search(case.refusal, str(error.value))[0]


def test_the_page_has_these_architectures():
    if WRITE:  # it is written when all is done
        return
    header, table = PAGE.read_text().split("| --- | --- | --- | --- |\n")
    assert [row.split(" | ")[0].removeprefix("| ") for row in table.splitlines()] == list(CASES)
    assert HEADER.startswith(header)
