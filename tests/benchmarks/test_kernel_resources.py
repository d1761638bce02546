import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_a_kernel_s_row_is_the_most_that_its_configurations_take(tmp_path):
    notes = [["b", "fp32", 90, 40, 1024, 0], ["a", "fp32", 80, 9, 8, 7], ["b", "fp32", 90, 32, 2048, 8]]
    (tmp_path / "notes").write_text("\n".join(map(json.dumps, notes)))
    command = [sys.executable, "-m", "benchmarks.kernel_resources", tmp_path / "notes", "--csv", tmp_path / "table"]
    subprocess.run(command, check=True, cwd=ROOT)
    assert (tmp_path / "table").read_text().splitlines() == [
        "kernel,dtype,architecture,registers,shared_bytes,stack_bytes",
        "a,fp32,80,9,8,7",
        "b,fp32,90,40,2048,8",
    ]
