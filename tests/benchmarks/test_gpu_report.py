"""The GPU report on a CPU: it runs end to end, finds what is planted, and leaves files that can be read however it ends."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def report(folder: Path, *arguments: str, root: Path = ROOT, **environment: str):
    """The finished command, and the rows that it stored in ``folder``."""
    command = [sys.executable, "-m", "benchmarks.gpu_report", "--device", "cpu", "--out", str(folder), *arguments]
    variables = {k: v for k, v in os.environ.items() if k not in ("OUT", "BOOTGRAD_BACKEND", "TRITON_INTERPRET")}
    done = subprocess.run(
        command, cwd=root, env=variables | environment, capture_output=True, text=True, errors="replace", timeout=1200
    )
    files = sorted(folder.glob("*.json"))
    return done, json.loads(files[0].read_text(encoding="utf-8"))["rows"] if files else []


def test_two_ops_and_a_step_end_to_end(tmp_path):
    sections = "correctness,ceilings,ops,steps"
    ops = "linear_rank1_sq_norms,group_norm_backward"
    out = tmp_path / "out"
    chosen = ("--no-build", "--sections", sections, "--ops", ops, "--models", "resnet18-tiny")
    done, rows = report(tmp_path / "report", *chosen, OUT=str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    stem = next((tmp_path / "report").glob("*.md")).stem
    assert stem.startswith("cpu-")
    found = {row["section"]: [r for r in rows if r["section"] == row["section"]] for row in rows}
    assert set(found) == set(sections.split(","))
    assert {row["device"].partition(" ")[0] for row in rows} == {"CPU"}

    right = [row for row in found["correctness"] if row["status"] == "ok"]
    assert {row["subject"] for row in right} == set(ops.split(","))
    assert {"eager", "triton"} <= {row["backend"] for row in right}
    assert {row["dtype"] for row in right} == {"bfloat16", "float16", "float32", "float64"}
    assert all(float(row["error"]) <= float(row["bound"]) for row in right)

    timed = [row for row in found["ops"] if row["status"] == "ok"]
    assert {(row["subject"], row["backend"]) for row in timed} >= {(op, "triton") for op in ops.split(",")}
    assert all(float(row["microseconds"]) > 0 and float(row["percent"]) > 0 for row in timed)
    steps = {(row["subject"], row["case"]): row for row in found["steps"]}
    for variant in ("plain", "rec.backward", "reg1 batch_mean", "reg1 ema", "reg1 zero", "reg2 ema"):
        assert steps["resnet18-tiny", variant]["status"] == "ok"
        assert float(steps["resnet18-tiny", variant]["ratio"]) > 0.1
    assert float(steps["resnet18-tiny", "reg2 ema"]["error"]) < 1e-4

    assert {path.name for path in out.iterdir()} == {path.name for path in (tmp_path / "report").iterdir()}
    with (out / f"{stem}.csv").open(newline="", encoding="utf-8") as file:
        assert list(csv.DictReader(file)) == rows
    page = (out / f"{stem}.md").read_text(encoding="utf-8")
    assert "## Right or wrong" in page and f"{len(right)} cases right, 0 wrong" in page


def test_a_wrong_result_fails_and_a_later_run_forgets_it(tmp_path):
    chosen = ("--no-build", "--sections", "correctness", "--backends", "eager", "--ops", "rank1_sq_norms")
    done, rows = report(tmp_path, *chosen, "--spoil", "linear_rank1_sq_norms")
    assert done.returncode == 1
    assert {row["status"] for row in rows} == {"failed"}
    assert all(0.09 < float(row["error"]) < 0.11 for row in rows)
    assert "failed" in done.stdout.splitlines()[-1]
    done, rows = report(tmp_path, *chosen)
    assert done.returncode == 0
    assert {row["status"] for row in rows} == {"ok"}


def test_a_process_that_dies_costs_its_case_and_no_more(tmp_path):
    chosen = ("--no-build", "--sections", "correctness", "--backends", "triton", "--ops", "linear_rank1,linear_jvp")
    done, rows = report(tmp_path, *chosen, "--spoil", "abort linear_rank1_sq_norms")
    assert done.returncode == 1
    crashed = [row for row in rows if row["status"] == "crashed"]
    assert {row["subject"] for row in crashed} == {"linear_rank1_sq_norms"}
    assert len(crashed) == 1
    assert sum((row["subject"], row["status"]) == ("linear_jvp", "ok") for row in rows) == 2


def test_a_cut_run_leaves_what_it_had(tmp_path):
    done, rows = report(tmp_path, "--no-build", "--sections", "ceilings,correctness,steps", "--seconds", "3")
    assert done.returncode in (0, 1), done.stderr
    assert "cut" in {row["status"] for row in rows}
    assert {row["status"] for row in rows} <= {"cut", "ok"}
    with next(tmp_path.glob("*.csv")).open(newline="", encoding="utf-8") as file:
        assert list(csv.DictReader(file)) == rows
    assert "the section's time was up" in next(tmp_path.glob("*.md")).read_text(encoding="utf-8")


def test_what_a_cpu_measured_does_not_go_where_gpus_are(tmp_path):
    done, _ = report(ROOT / "benchmarks/results/gpu", "--no-build", "--sections", "ceilings")
    assert done.returncode == 1
    assert "is for what GPUs measured" in done.stderr
    assert not list((ROOT / "benchmarks/results/gpu").glob("cpu-*"))


def test_the_prediction_on_the_page_is_what_the_code_makes():
    command = [sys.executable, "-m", "benchmarks.traffic", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_a_missing_gpu_is_said_before_anything_is_built(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu_report", "--device", "cuda", "--out", str(tmp_path)]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.strip().startswith("torch sees no CUDA device") and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_a_bare_checkout_builds_in_place_and_uses_its_own_kernels(tmp_path):
    root = tmp_path / "checkout"
    for name in ("bootgrad", "benchmarks", "kernels", "csrc"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("*.so", "__pycache__", "results"))
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, root / name)
    chosen = ("--sections", "correctness", "--ops", "linear_rank1_sq_norms")
    done, rows = report(tmp_path / "report", *chosen, "--seconds", "2000", root=root)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "_C: built in" in done.stdout
    assert {"compiled", "triton", "eager"} == {row["backend"] for row in rows if row["status"] == "ok"}
    code = "import benchmarks.gpu_report, bootgrad.kernels as k; print(k.__file__)"
    used = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True).stdout
    assert Path(used.strip()) == root / "kernels/__init__.py"
