"""One command that tells what the library is worth on this machine's GPU: right or wrong, how fast, how much memory.

    python -m benchmarks.gpu_report            (make gpu-report)

`worker` runs a section's cases in child processes, so that a kernel that faults or hangs costs a case and not the report;
`rows` stores each row as it comes. Sections: `correctness`, `ceilings`, `ops`, `steps`, `capture`, `tune`, `sanitize`.
Needs python, torch and this checkout only: nothing is installed, and nothing fetched.
"""

from . import in_place

in_place.install()
