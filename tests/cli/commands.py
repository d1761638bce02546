"""Commands as a user types them, and what they leave in files."""

import csv
import os
import signal
import subprocess
import sys
from pathlib import Path

import torch

import bootgrad

THREADS = str(torch.get_num_threads())
MODEL = """
from torch import nn
def make_model():
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 5))
def fails():
    raise LookupError("no weights here")
def number():
    return 7
def words():
    return nn.Sequential(nn.Embedding(5, 4).requires_grad_(False), nn.Flatten(), nn.Linear(12, 2))
def double():
    return make_model().double()
constant = 3
"""


def train(data, out, *options):
    return ["train", "--data", data, "--out", str(out), "--batch-size", "4", "--threads", THREADS, *options]


def read_csv(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def timeless(rows):
    return [{name: value for name, value in row.items() if "seconds" not in name} for row in rows]


def start(*arguments):
    """The command line in a process of its own, which SIGINT reaches whatever started the tests."""
    environment = {**os.environ, "PYTHONPATH": str(Path(bootgrad.__file__).parents[1]), "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "bootgrad", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
