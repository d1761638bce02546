"""What SECURITY.md says of the package's own code, over its syntax trees."""

import ast
import re
from pathlib import Path

import numpy as np
import pytest

from bootgrad.cli import main
from bootgrad.errors import DataError
from bootgrad.training.files import NPZ_ARRAYS, read_npz

ROOT = Path(__file__).parents[2]
LOADERS = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "yaml", "pandas"}
CALLS = {"eval", "exec", "compile", "__import__"}
# What starts a program or runs a file, and where it belongs.
STARTS = {
    "subprocess": set(),
    "multiprocessing": set(),
    "runpy": set(),
    "ctypes": {"bootgrad/ops/library.py", "bootgrad/heap.py"},
}
RUNS_A_FILE = {"bootgrad/cli.py"}


def sources():
    return [path for folder in ("bootgrad", "kernels") for path in sorted((ROOT / folder).rglob("*.py"))]


def violations(name, source):
    """What in a module could run what a file holds, in words."""
    found = []
    for node in ast.walk(ast.parse(source)):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            modules = [node.module or ""]
        for root in {module.partition(".")[0] for module in modules}:
            if root in LOADERS:
                found.append(f"{name} imports {root}")
            if root in STARTS and name not in STARTS[root]:
                found.append(f"{name} imports {root}")
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        options = {k.arg: ast.unparse(k.value) for k in node.keywords}
        last = called.rpartition(".")[2]
        if called in CALLS:
            found.append(f"{name} calls {called}")
        if last == "exec_module" and name not in RUNS_A_FILE:
            found.append(f"{name} runs a module's file")
        if called.startswith("os.") and (
            last in ("system", "popen") or re.match(r"(exec|spawn|posix_spawn)[lv]?", last)
        ):
            found.append(f"{name} calls {called}")
        if last == "load" and called.startswith("torch.") and options.get("weights_only") != "True":
            found.append(f"{name} calls {called}, and not torch.load with weights_only=True")
        if options.get("allow_pickle", "False") != "False":
            found.append(f"{name} allows pickles")
        if last in ("loads", "Unpickler", "read_pickle", "read_array"):
            if called not in ("json.loads",):
                found.append(f"{name} calls {called}")
    return found


def test_nothing_in_the_package_runs_what_a_file_holds():
    paths = sources()
    assert len(paths) > 150
    assert [v for p in paths for v in violations(p.relative_to(ROOT).as_posix(), p.read_text(encoding="utf-8"))] == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "def f():\n    import joblib.parallel",
        "import subprocess",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=wanted)",
        "torch.jit.load(path)",
        "np.load(path, allow_pickle=True)",
        "np.lib.format.read_array(file)",
        "exec(text)",
        "eval(text)",
        "os.system(text)",
        "os.execvp(text, [])",
        "spec.loader.exec_module(module)",
        "torch.hub.load(repository)",
    ],
)
def test_the_search_finds(source):
    assert len(violations("bootgrad/x.py", source)) == 1


@pytest.mark.parametrize(
    "source", ["torch.load(p, weights_only=True)", "model.eval()", "json.load(f)", "self.compile()"]
)
def test_the_search_lets_pass(source):
    assert violations("bootgrad/x.py", source) == []


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.mkdir, (self.path,)


def test_arrays_of_objects_are_not_unpickled(tmp_path, capsys):
    trap, file = tmp_path / "trap", tmp_path / "images.npz"
    good = {name: np.zeros((6, 8, 8), np.uint8) if name[0] == "x" else np.arange(6) % 2 for name in NPZ_ARRAYS}
    for name in NPZ_ARRAYS:
        np.savez(file, **good | {name: np.array([Trap(trap)], object)})
        with pytest.raises(DataError, match="unpickling can run code"):
            read_npz(file)
        assert main(["train", "--data", str(file), "--out", str(tmp_path / "out")]) == 2
        assert not trap.exists()
    np.load(file, allow_pickle=True)[NPZ_ARRAYS[-1]]
    assert trap.exists()  # it would have worked


def test_what_the_page_says_of_files_is_what_there_is():
    page = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    assert "FILE.py:FUNCTION" in page and "weights_only=True" in page
    texts = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in sources()}
    loaders = [name for name, text in texts.items() if "weights_only=True" in text]
    assert loaders == ["bootgrad/integrations/transformers.py", "bootgrad/training/checkpoint.py"]
    readers = [name for name, text in texts.items() if re.search(r"zipfile\.ZipFile|gzip\.open", text)]
    assert readers == ["bootgrad/training/checkpoint.py", "bootgrad/training/files.py"]
