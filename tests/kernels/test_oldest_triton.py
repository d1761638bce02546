"""The kernels compiled by the oldest Triton that is promised, which is the one that torch brings to most GPUs."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from bootgrad.ops.backends.gpu import OLDEST_TRITON

from .loading import ROOT

# Of the tests of this folder that compile: every kernel once or more, and for Blackwell, where the oldest compiler fails
# most, the bfloat16 ones in every configuration.
ONES = "few_channels_compile or reductions or unusual or one_gpu or every_configuration and 100 and (bf16 or bfloat16)"


@pytest.mark.slow
def test_the_oldest_triton_compiles_the_kernels(tmp_path):
    """Beside the installed one, in front of it on the path of a process of its own; a minute."""
    version = ".".join(map(str, (*OLDEST_TRITON, 0)))
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_") and k != "KERNEL_RESOURCES"}
    environment |= {"PYTHONPATH": str(tmp_path), "TRITON_CACHE_DIR": str(tmp_path / "cache")}

    def run(*command):
        done = subprocess.run(
            [sys.executable, "-m", *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1200
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run("pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path), f"triton=={version}")
    code = "import sys, pytest, triton; print(triton.__version__); sys.exit(pytest.main(sys.argv[1:]))"
    (tmp_path / "compile_all.py").write_text(code)
    files = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests/kernels").glob("test_*.py"))
    output = run("compile_all", "-q", "-p", "no:cacheprovider", *files, "-k", ONES)
    assert output.splitlines()[0] == version
    assert int(output.splitlines()[-1].split(" passed")[0]) >= 33 and "failed" not in output
