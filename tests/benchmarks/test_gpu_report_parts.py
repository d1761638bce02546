"""The GPU report's parts, each alone: what they make of a GPU is tried on stand-ins for one."""

import contextlib
import importlib
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bootgrad import batch_check
from bootgrad.planning import LinearLayer

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def part(monkeypatch):
    """A module of benchmarks by name."""
    monkeypatch.syspath_prepend(str(ROOT))
    return lambda name: importlib.import_module(f"benchmarks.{name}")


def test_weights_and_centers_are_tried_with_strides_too(part):
    """Such as are kept on the way to a device: a strided tensor of one's own is where kernels go wrong."""
    layer = LinearLayer(4, 3, 5, 6)
    assert {"apart": True} in part("gpu_report.correctness").variants("linear_weighted_sum", layer, True)
    examples = part("gpu_report.examples")
    x, gy, w = examples.moved(examples.arguments("linear_weighted_sum", layer, torch.float32, apart=True), "cpu")
    assert (x.stride(), gy.stride(), w.stride()) == ((15, 5, 1), (18, 6, 1), (2,))
    assert torch.equal(w, examples.arguments("linear_weighted_sum", layer, torch.float32)[2])


@pytest.fixture
def tiny(part):
    """The smallest task's name, model and batch."""
    steps, options = part("gpu_report.steps"), part("gpu_report.options").Options(device="cpu")
    name, task = next(iter(steps.tasks(options).items()))
    return name, *steps.build(task, "cpu")


def test_no_measured_step_checks_the_batch(part, tiny, monkeypatch):
    steps = part("gpu_report.steps").own_steps(*tiny[1:], "cpu")
    checks = []
    monkeypatch.setattr(batch_check.BatchCheck, "row_norms", lambda *arguments: checks.append(arguments))
    for step in steps.values():
        step()
    assert len(steps) == 5 and not checks


class InvalidCapture:
    """As torch.cuda.graph after a step that synchronized: its end raises, and it has not left its stream."""

    def __init__(self, graph):
        pass

    def __enter__(self):
        torch.cuda.set_stream("the capture's")

    def __exit__(self, *raised):
        raise RuntimeError("operation failed due to a previous error during capture")


def test_a_failed_capture_tells_its_cause_and_leaves_its_stream(part, monkeypatch):
    streams = ["ours"]
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", InvalidCapture)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: streams[-1])
    monkeypatch.setattr(torch.cuda, "set_stream", streams.append)

    def step():
        try:
            raise KeyError("what was handled long ago")
        except KeyError:
            raise RuntimeError("a synchronization") from None

    with pytest.raises(RuntimeError, match="^a synchronization$"):
        part("gpu_report.timing").captured(step)
    with pytest.raises(RuntimeError, match="^operation failed"):
        part("gpu_report.timing").captured(lambda: None)
    assert streams == ["ours", "the capture's", "ours", "the capture's", "ours"]


@pytest.mark.parametrize("variant", ["plain", "rec.backward", "reg1 batch_mean", "reg1 ema"])
def test_a_replay_is_compared_with_the_same_step(part, tiny, monkeypatch, variant):
    """A moving center is where the expected step found it: the gradients are the same, not about the same."""
    name, *model_and_batch = tiny
    capture = part("gpu_report.capture")
    stream = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(capture.steps, "build", lambda *arguments: model_and_batch)
    monkeypatch.setattr(capture.steps, "tasks", lambda options: {name: None})
    monkeypatch.setattr(capture.steps, "autocast", lambda device: contextlib.nullcontext)
    monkeypatch.setattr(capture.timing, "captured", lambda step: SimpleNamespace(replay=step))
    monkeypatch.setattr(capture.timing, "interleave", lambda ways, *rest: dict.fromkeys(ways, [1.0]))
    options = part("gpu_report.options").Options()
    (row,) = capture.capture(name, variant, options)
    assert row["status"] == "ok" and row["error"] < 1e-6


def test_every_capture_has_a_process_of_its_own(part):
    capture, options = part("gpu_report.capture"), part("gpu_report.options").Options()
    shards = capture.shards(options)
    assert len(set(shards)) == len(capture.MODELS) * len(capture.VARIANTS)
    assert all(len(capture.cases(shard, options)) == 1 for shard in shards)
    assert capture.cases(shards[1], options)[0][0] == "resnet18-cifar: rec.backward"


def test_a_build_that_fails_says_why(part):
    reason_in = part("gpu_report.build").reason_in
    compiler = "csrc/a.cu(3): error: identifier is undefined\nRuntimeError: Error compiling objects for extension\n"
    assert reason_in("0 errors so far\n" + compiler) == "csrc/a.cu(3): error: identifier is undefined"
    python = "Traceback:\n  errors.py line 3\nModuleNotFoundError: No module named 'setuptools'\n"
    assert reason_in(python) == "ModuleNotFoundError: No module named 'setuptools'"
    assert reason_in("stopped\n") == ""


def test_a_library_for_another_card_is_stale(part, monkeypatch, tmp_path):
    build = part("gpu_report.build")
    for name in ("bootgrad", "csrc"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(build, "ROOT", tmp_path)
    monkeypatch.setattr(build, "STAMP", tmp_path / "build/stamp.json")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    (tmp_path / "setup.py").touch()
    assert build.is_stale("_C_cuda", "cuda")
    for name in ("_C", "_C_cuda"):
        (tmp_path / f"bootgrad/{name}.so").touch()
    assert [build.is_stale(name, "cuda") for name in ("_C", "_C_cuda")] == [False, True]
    build.note("cuda")
    assert not build.is_stale("_C_cuda", "cuda")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0")
    assert build.is_stale("_C_cuda", "cuda")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    os.utime(tmp_path / "bootgrad/_C_cuda.so", (time.time() + 5,) * 2)  # built by something else
    assert build.is_stale("_C_cuda", "cuda")


def test_what_takes_too_long_is_stopped_with_its_children(part, tmp_path):
    run = part("gpu_report.commands").run
    assert run(["sh", "-c", f"sleep 60 & echo $! > {tmp_path}/pid; wait"], 1.0) == (None, "")
    child = int((tmp_path / "pid").read_text())
    deadline = time.time() + 10
    while _runs(child) and time.time() < deadline:
        time.sleep(0.05)
    assert not _runs(child)
    status, output = run([sys.executable, "-c", "import sys; print('out'); sys.exit(3)"], 60.0)
    assert (status, output) == (3, "out\n")


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


def test_verdicts_of_the_sanitizer(part):
    verdict = part("gpu_report.sanitize").verdict
    hazard = "========= Error: Race reported\n========= RACECHECK SUMMARY: 1 hazard displayed (1 error)\n"
    assert verdict("racecheck", 9, hazard)["status"] == "to look at"
    assert verdict("memcheck", 9, "========= Invalid read\n========= ERROR SUMMARY: 1 error\n")["status"] == "failed"
    assert verdict("racecheck", 0, "========= RACECHECK SUMMARY: 0 hazards displayed\n")["status"] == "ok"
    assert verdict("memcheck", 1, "Segmentation fault\n") == {"status": "error", "detail": "Segmentation fault"}
    assert "to look at" not in part("gpu_report.rows").WRONG


def test_what_starts_may_be_silent_for_longer(part):
    worker, sanitize = part("gpu_report.worker"), part("gpu_report.sanitize")
    child = SimpleNamespace(total=-1)
    assert worker.Child.silence(child) == worker.STARTING > worker.SILENCE
    worker._take(child, {"total": 3}, None)
    assert worker.Child.silence(child) == worker.SILENCE
    assert sanitize.SECONDS < min(worker.SILENCE, part("gpu_report.__main__").SECTIONS["sanitize"][0])


def test_measurements_are_those_of_the_card_itself(part, monkeypatch):
    traffic = part("traffic")
    h100, h200 = traffic.MACHINES
    row = dict(section="ops", subject="op", case="case", status="ok", backend="triton", date="2026-01-01", time="10:00")
    devices = ("NVIDIA H100 80GB HBM3", "NVIDIA H100 PCIe", "NVIDIA H100 NVL", "NVIDIA GH200 480GB", "NVIDIA H200")
    monkeypatch.setattr(
        traffic, "_stored", lambda: [row | {"device": name, "microseconds": f"{len(name)}"} for name in devices]
    )
    found = [traffic.measured(machine, "ops", "op", "case")["device"] for machine in (h100, h200)]
    assert found == ["NVIDIA H100 80GB HBM3", "NVIDIA H200"]
