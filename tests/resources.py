"""What compiled GPU kernels take, noted by the tests that compile them, for `benchmarks.kernel_resources` to add up."""

import json
import os


def note(kernel: str, dtype: str, architecture: int, registers: int, shared: int, stack: int) -> None:
    """Add a line to the file that KERNEL_RESOURCES names, if it does; lines of several processes do not mix."""
    path = os.environ.get("KERNEL_RESOURCES")
    if path:
        with open(path, "a") as file:
            file.write(json.dumps([kernel, dtype, architecture, registers, shared, stack]) + "\n")
