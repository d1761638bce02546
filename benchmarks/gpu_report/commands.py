"""Commands that may take too long: stopped with everything that they have started."""

import contextlib
import os
import signal
import subprocess
from collections.abc import Sequence

from .in_place import ROOT


def run(command: Sequence[str], seconds: float, environment: dict[str, str] | None = None) -> tuple[int | None, str]:
    """The exit status of a command and what it printed; None where it took longer than ``seconds``.

    Args:
        command: program and arguments; run at the root of the checkout.
        seconds: after which the command and its children get SIGKILL: compilers outlive the program that started them.
        environment: variables beside this process's own.
    """
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | (environment or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        return None, ""
    finally:
        stop(process)
        process.stdout.close()
    return process.returncode, output


def stop(process: subprocess.Popen, patience: float = 10.0) -> int:
    """End a process that leads a session, and what it started; its exit status, or SIGKILL's where it does not end.

    Args:
        process: started with ``start_new_session``.
        patience: seconds to wait for its end: a process that waits for a device that hangs cannot be killed.
    """
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        return process.wait(patience)
    return -signal.SIGKILL
