"""Other processes: workers that load data beside a recording, a child that records, and ends in the midst of one."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import bootgrad

ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (Path(bootgrad.__file__).parents[1],)))}

COMMON = """
import os, sys, threading
import torch
import torch.nn.functional as F
from torch import nn
import bootgrad

def model_of():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(72, 3))

def step(model, x, y):
    reg = bootgrad.GradientRegularizer(model, reg1=0.1)
    model.zero_grad()
    reg.backward(lambda x, y: F.cross_entropy(model(x), y, reduction="none"), x, y)
    with bootgrad.record(model) as rec:
        losses = F.cross_entropy(model(x), y, reduction="none")
    return rec.backward(losses).sq_norms

def batch(size=64):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(size, 1, 8, 8, generator=generator), torch.randint(0, 3, (size,), generator=generator)
"""

LOADERS = (
    COMMON
    + """
from torch.utils.data import DataLoader, TensorDataset

def run():
    torch.set_num_threads(2)
    x, y = batch(48)
    model, plain = model_of(), model_of()
    expected = [step(plain, *part) for part in zip(x.split(16), y.split(16))]  # the threads of torch's pool are there
    with bootgrad.record(model):  # the workers come into being in the midst of a recording
        model(x)
        first = iter(DataLoader(TensorDataset(x, y), 16, num_workers=2, multiprocessing_context=sys.argv[1]))
    found = [step(model, *part) for part in first]
    assert len(found) == 3 and all(map(torch.equal, found, expected))
    print("done", flush=True)

if __name__ == "__main__":
    run()
"""
)

# A child of a process whose OpenMP threads have run has none of them: GNU's OpenMP would wait for them. One thread needs none.
FORKED = (
    COMMON
    + """
import signal
torch.set_num_threads(2)
expected = step(model_of(), *batch())
rec = bootgrad.record(model_of())
rec.__enter__()  # a recording that is open in the parent, and in the child
if os.fork() == 0:
    signal.alarm(int(sys.argv[1]))
    rec.__exit__(None, None, None)
    torch.set_num_threads(1)
    found = step(model_of(), *batch())
    os._exit(0 if torch.allclose(found, expected, rtol=1e-5) else 3)
_, status = os.wait()
rec.__exit__(None, None, None)
assert torch.equal(step(model_of(), *batch()), expected)
print("done", os.waitstatus_to_exitcode(status), flush=True)
"""
)

ENDINGS = {
    "in a recording": """
rec = bootgrad.record(model)
rec.__enter__()
losses = F.cross_entropy(model(x), y, reduction="none")
""",
    "with matrices alive": """
with bootgrad.record(model) as rec:
    losses = F.cross_entropy(model(x), y, reduction="none")
G = rec.per_sample_gradients(losses, create_graph=True)
kept = G.sq_norms(), G[:8], G.T
(losses.mean() + bootgrad.reg1(G)).backward(retain_graph=True)
""",
    "in a block of micro-batches": """
reg = bootgrad.GradientRegularizer(model, reg1=0.1, reg2=0.1, center="ema")
block = reg.accumulate()
block.__enter__()
reg.backward(lambda x, y: F.cross_entropy(model(x), y, reduction="none"), x, y)
""",
    "by sys.exit within a forward pass": """
class Exits(nn.Module):
    def forward(self, x):
        sys.exit(0)
model.append(Exits())
with bootgrad.record(model):
    model(x)
""",
    "with threads in the midst of a recording": """
class Waits(nn.Module):
    def forward(self, x):
        ready.set()
        threading.Event().wait()
def work():
    own = model_of().append(Waits())
    with bootgrad.record(own):
        own(x)
ready = threading.Event()
threading.Thread(target=work, daemon=True).start()
assert ready.wait(120)
step(model, x, y)
""",
    # The interpreter waits for these. It does not for daemons: torch alone then aborts as soon as one of them is in a step.
    "while threads take steps": """
def work(ready):
    own = model_of()
    for _ in range(50):
        step(own, x, y)
        ready.set()
for ready in [threading.Event() for _ in range(3)]:
    threading.Thread(target=work, args=(ready,)).start()
    assert ready.wait(120)
""",
}


def run(code, *arguments, tmp_path):
    path = tmp_path / "program.py"
    path.write_text(code)
    command = [sys.executable, "-W", "error", str(path), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=300, cwd=tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="fork and forkserver")
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_workers_load_beside_a_recording(method, tmp_path):
    done = run(LOADERS, method, tmp_path=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_records_with_one_thread(tmp_path):
    done = run(FORKED, 120, tmp_path=tmp_path)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert done.stdout == "done 0\n", f"{done.stdout}: -{signal.SIGALRM.value} is a child that has hung"


def ending(code, tmp_path):
    start = "torch.set_num_threads(1)\nmodel, (x, y) = model_of(), batch()\nstep(model, x, y)\n"
    return run(f"{COMMON}\n{start}{code}", tmp_path=tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("where", ENDINGS)
def test_a_process_ends_quietly(where, tmp_path):
    done = ending(ENDINGS[where], tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
