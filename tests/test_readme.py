"""The Python of the README and of docs/units.md gives what they say; the README's commands and files are all there."""

import re

import pytest
import torch
import torch.nn.functional as F

import bootgrad

from .docs.test_blocks import ROOT, run


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_the_python_blocks_run_one_after_the_other(capsys):
    names = run(ROOT / "README.md")
    stats, G = names["stats"], names["G"].materialize()
    rows = torch.cat([g.flatten(1) for g in G.values()], dim=1).detach()
    assert rows.shape == (32, sum(p.numel() for p in names["model"].parameters()))
    gamma = (rows - rows.mean(0)).square().sum(1).mean()
    assert float(names["G"].covariance_trace().detach()) == pytest.approx(float(gamma), rel=1e-4)
    assert names["sequences"].sq_norms.shape == (5,) and float(names["sequences"].covariance_trace) > 0
    assert stats.covariance_trace > 0 and names["report"].reg1 > 0
    in_float16, in_bfloat16 = names["step"].report, names["in_bfloat16"]  # one step later
    assert float(in_bfloat16.covariance_trace) == pytest.approx(float(in_float16.covariance_trace), rel=0.1)
    parameters = list(names["language_model"].parameters())
    logits = names["language_model"](names["ids"])
    own = F.cross_entropy(logits.mT, names["targets"], reduction="none").mean(1)
    rows = [torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters, retain_graph=True)]) for loss in own]
    torch.testing.assert_close(
        names["of_text"].sq_norms, torch.stack([r.square().sum() for r in rows]), rtol=1e-4, atol=0
    )
    spread = torch.stack(rows).var(0, correction=0).sum()
    torch.testing.assert_close(names["of_text"].covariance_trace, spread, rtol=1e-4, atol=0)
    changed = names["ids"].clone()
    changed[:, 12:] = 0  # causal: what comes later is not seen
    torch.testing.assert_close(names["language_model"](changed)[:, :12], logits[:, :12])
    assert "bootgrad agrees with plain autograd on 4 samples" in capsys.readouterr().out
    patches = torch.nn.functional.unfold(names["x"], 3, padding=1)
    windows = torch.einsum("bot,bit->boi", names["gy"].flatten(2), patches)
    torch.testing.assert_close(names["s"], windows.square().sum((1, 2)), rtol=1e-4, atol=0)


def test_units_are_as_they_are_said_to_be():
    names = run(ROOT / "docs/units.md")
    model, x, y, lengths, w = (names[name] for name in ("model", "x", "y", "lengths", "w"))
    parameters = list(model.parameters())

    def rows_of(losses):
        grads = (torch.autograd.grad(loss, parameters, retain_graph=True) for loss in losses)
        return torch.stack([torch.cat([g.flatten() for g in row]) for row in grads])

    own, total = rows_of(names["own_mean"](x, y)), rows_of(names["total"](x, y))
    torch.testing.assert_close(total, own * lengths[:, None])
    for stats, rows in (
        (names["by_mean"], own),
        (names["by_sum"], total),
        (names["by_batch"], total * len(y) / lengths.sum()),
        (names["batch"].statistics, own),
    ):
        torch.testing.assert_close(
            stats.covariance_trace, (rows - rows.mean(0)).square().sum(1).mean(), rtol=1e-4, atol=0
        )
    scale = len(y) / float(lengths.sum())
    torch.testing.assert_close(names["by_batch"].covariance_trace, scale**2 * names["by_sum"].covariance_trace)
    torch.testing.assert_close(names["by_batch"].noise_scale, names["by_sum"].noise_scale)
    outputs = model(x).transpose(1, 2)
    torch.testing.assert_close(names["batch_mean"](x, y).mean(), F.cross_entropy(outputs, y))
    full = torch.randint(10, (8, 12))  # of sequences of one length, Γ of sums is T² times that of means
    sums, means = (names["statistics"](names[name], x, full) for name in ("total", "own_mean"))
    torch.testing.assert_close(sums.covariance_trace, 144 * means.covariance_trace)
    z, t = names["z"], names["t"]
    torch.testing.assert_close(names["weighted"](z, t).mean(), F.cross_entropy(model(z), t, weight=w))
    plain = rows_of(F.cross_entropy(model(z), t, reduction="none"))
    torch.testing.assert_close(names["of_step"].sq_norms, plain.square().sum(1), rtol=1e-4, atol=0)
    torch.testing.assert_close(
        names["in_losses"].sq_norms, (plain * (w[t] / w[t].mean())[:, None]).square().sum(1), rtol=1e-4, atol=0
    )
    with pytest.raises(bootgrad.BootgradError):
        names["statistics"](lambda x, y: names["token_losses"](x, y).flatten(), x, y)


def test_every_command_is_shown():
    README = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = {line.split()[1] for line in re.findall(r"^bootgrad .*$", README, re.MULTILINE)}
    assert commands == {"train", "compare", "experiment", "diagnose", "plan", "info", "report"}


def test_links_lead_to_files():
    targets = re.findall(r"\]\(([^)#:]+)\)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert "docs/images/comparison.png" in targets and "LICENSE" in targets
    for target in targets:
        assert (ROOT / target).is_file(), target
