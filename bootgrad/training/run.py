"""Runs in folders: train with a progress bar, write what was measured, stop on Ctrl-C and go on again.

A folder holds ``checkpoint.pt`` (after each epoch, and when interrupted), ``run.csv`` (a row per step), ``run.json``
(settings, versions, device, epochs) and ``run.png``.
"""

import contextlib
import datetime
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import bootgrad

from ..errors import ArgumentError, DataError
from . import checkpoint, tables
from .data import load
from .environment import device_info, versions
from .figures import draw_comparison, draw_run
from .history import EPOCH_COLUMNS, finite, write_csv
from .loop import Trainer, TrainingError
from .settings import ESTIMATOR, SETTING_NAMES, Settings

CHECKPOINT = "checkpoint.pt"
MAY_CHANGE = (
    "epochs",
    "threads",
    "device",
    "data",
    "data_root",
)  # between a checkpoint and the run that goes on from it
VARIANT_NAMES = ("plain", "Reg1", "Reg1 + Reg2")
_CHECKED_SAMPLES = 4
_MOST_ROWS = 20  # of a run's table on the terminal
_WIDTHS = [max(10, len(name)) for name in tables.EPOCH_HEADER]


class Interruption:
    """A context in which the first Ctrl-C is only noted, to be obeyed after the step; the second one acts as ever."""

    requested = False

    def __enter__(self):
        """Take over SIGINT, where this thread may."""
        self._before = None
        is_ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        if threading.current_thread() is threading.main_thread() and not is_ignored:
            self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *exc):
        """Give SIGINT back."""
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _note(self, number, frame):
        self.requested = True
        signal.signal(signal.SIGINT, self._before)


@contextlib.contextmanager
def enough_memory() -> Iterator[None]:
    """A context, or decorator, that turns the many errors of a full memory into one.

    Raises:
        TrainingError: memory could not be had.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch has a class for a full GPU only
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error):
            raise TrainingError(
                "there is too little memory for this run: lower --batch-size, or give --data smaller images"
            ) from error
        raise


@enough_memory()
def train(
    options: Mapping[str, Any],
    out: Path,
    *,
    resume: Path | None = None,
    overwrite: bool = False,
    check: bool = False,
    say: Callable[[str], None] = print,
) -> tuple[Trainer, bool]:
    """Train into the folder ``out``, from the start or from a checkpoint.

    Args:
        options: settings by name, those that were given; others come from the checkpoint or are the defaults.
        out: folder of the run, made if need be.
        resume: checkpoint to go on from.
        overwrite: replace the run that the folder holds.
        check: compare the library with plain autograd on a few images first, and print the table.
        say: prints a line.

    Returns:
        The run, and whether it came to its end; if not, it was interrupted and its checkpoint is in the folder.

    Raises:
        BootgradError: bad options, data or checkpoint.
    """
    from tqdm import tqdm

    state = None if resume is None else checkpoint.read(resume)
    settings = Settings(**options) if state is None else _resumed_settings(state["settings"], options)
    data = load(settings.data, root=settings.data_root)
    trainer = Trainer(settings, data)
    if state is not None:
        trainer.load_state_dict(state)
    goes_on = _prepare_folder(out, resume, overwrite)
    say(_describe(trainer))
    if check:
        _verify(trainer)
    for name in (CHECKPOINT, "run.csv", "run.json", "run.png"):
        checkpoint.remove_unfinished(out / name)
    checkpoint.save(out / CHECKPOINT, trainer.state_dict())
    if not goes_on:
        _remove_results(out)
    steps = settings.epochs * trainer.steps_per_epoch
    done = len(trainer.history.steps)
    with (
        Interruption() as interruption,
        tqdm(total=steps, initial=done, unit="step", leave=False, disable=None) as bar,
    ):
        rows_apart = -(-settings.epochs // _MOST_ROWS)
        bar.write(tables.line(tables.EPOCH_HEADER, _WIDTHS))
        while not trainer.is_finished and not interruption.requested:
            try:
                finished = trainer.run_epoch(lambda: interruption.requested, lambda row: _show(bar, row))
            finally:
                trainer.history.write_csv(out / "run.csv")
            checkpoint.save(out / CHECKPOINT, trainer.state_dict())
            if finished and (trainer.epoch % rows_apart == 0 or trainer.is_finished):
                bar.write(tables.line(tables.epoch_cells(trainer.history.epochs.row(-1)), _WIDTHS))
        _write(trainer, out)
    return trainer, trainer.is_finished


def compare(
    options: Mapping[str, Any],
    out: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    say: Callable[[str], None] = print,
) -> bool:
    """Train plainly, with Reg1, and with Reg1 and Reg2, from one seed, and draw and tabulate the runs side by side.

    Args:
        options: settings by name; ``reg1`` and ``reg2`` are those of the variants that have them. Those not given are
            the defaults, or under ``resume`` what the runs that are there have in common.
        out: folder of ``comparison.png``, ``comparison.csv`` and one folder per variant.
        resume: go on with each variant's run that is there.
        overwrite: start anew.
        say: prints a line.

    Returns:
        Whether all came to their end.

    Raises:
        BootgradError: bad options or data, or runs that cannot be compared.
    """
    penalties: tuple[dict[str, float], ...] = ({"reg1": 0.0, "reg2": 0.0}, {"reg2": 0.0}, {})
    folders = [out / name.lower().replace(" + ", "_") for name in VARIANT_NAMES]
    checkpoints = [path if resume and os.path.isfile(path) else None for path in (f / CHECKPOINT for f in folders)]
    options = {**_common_settings(checkpoints, penalties, options), **options}
    settings = Settings(**options)
    if not (settings.reg1 > 0 and settings.reg2 > 0):
        raise ArgumentError(
            "a comparison needs --reg1 and --reg2 above 0, for the variants that have them; "
            f"got {settings.reg1:g} and {settings.reg2:g}"
        )
    for folder, before in zip(folders, checkpoints, strict=True):
        _prepare_folder(folder, before, overwrite)
    runs = {}
    for name, folder, before, penalty in zip(VARIANT_NAMES, folders, checkpoints, penalties, strict=True):
        say(f"\n{name}")
        runs[name], finished = train({**options, **penalty}, folder, resume=before, overwrite=overwrite, say=say)
        if not finished:
            return False
    header = ("variant", *tables.EPOCH_HEADER[1:])
    rows = [(name, *tables.epoch_cells(run.history.epochs.row(-1))[1:]) for name, run in runs.items()]
    say("\n" + tables.table(header, rows))
    trainer = runs[VARIANT_NAMES[-1]]
    s = trainer.settings
    title = f"{s.data}, {trainer.images} training images, batch {s.batch_size}: {s.penalty}"
    draw_comparison({name: run.history for name, run in runs.items()}, title, out / "comparison.png")
    _write_comparison(runs, out / "comparison.csv")
    say(f"\nwritten: {out / 'comparison.png'}, {out / 'comparison.csv'} and a folder per variant")
    return True


def _resumed_settings(stored: Any, given: Mapping[str, Any]) -> Settings:
    """The checkpoint's settings, with those given that may change; one of before there were estimators has the default."""
    defaults = {name: getattr(Settings, name) for name in ESTIMATOR}
    if not isinstance(stored, dict) or set(defaults | stored) != set(SETTING_NAMES):
        raise DataError("the checkpoint's settings are not those of bootgrad train: start anew")
    stored = defaults | stored
    for name, value in given.items():
        if name not in MAY_CHANGE and value != stored[name]:
            option = name.replace("_", "-")
            raise ArgumentError(
                f"--{option} {value} differs from the checkpoint's {stored[name]}: leave it out, or start a new run"
            )
    return Settings(**{**stored, **given})


def _common_settings(
    checkpoints: Sequence[Path | None], penalties: Sequence[Mapping[str, float]], given: Mapping[str, Any]
) -> dict[str, Any]:
    """What the settings of the checkpoints that there are agree in, their penalties left out."""
    runs = {
        path.parent: _resumed_settings(checkpoint.read(path)["settings"], {**given, **penalty}).as_dict()
        for path, penalty in zip(checkpoints, penalties, strict=True)
        if path is not None
    }
    common: dict[str, Any] = {}
    for folder, settings in runs.items():
        for name in SETTING_NAMES:
            if name not in ("reg1", "reg2") and common.setdefault(name, settings[name]) != settings[name]:
                option = name.replace("_", "-")
                remedy = f"give --{option}" if name in MAY_CHANGE else "start anew by --overwrite"
                raise ArgumentError(
                    f"{folder} was trained with --{option} {settings[name]}, {next(iter(runs))} with {common[name]}, "
                    f"which is no comparison: {remedy}"
                )
    return common


def _prepare_folder(out: Path, resume: Path | None, overwrite: bool) -> bool:
    """Make the folder; refuse a run in it that is to be neither replaced nor gone on with; tell whether it goes on."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        exists = (out / CHECKPOINT).exists()
        goes_on = exists and resume is not None and resume.samefile(out / CHECKPOINT)
    except (OSError, ValueError) as error:
        raise DataError(f"--out {out} cannot be made or entered ({error}): choose another folder") from error
    if (out / "results.csv").exists():
        raise ArgumentError(
            f"--out {out} holds a bootgrad experiment, whose run.json would be replaced: choose another folder"
        )
    if goes_on and overwrite:
        raise ArgumentError(
            f"--overwrite would replace the run in {out} that --resume goes on with: leave one of them out, "
            "or choose another --out"
        )
    if exists and not (goes_on or overwrite):
        raise ArgumentError(
            f"--out {out} holds a run already: go on with it by --resume, replace it by --overwrite, "
            "or choose another folder"
        )
    return goes_on


def _remove_results(out: Path) -> None:
    """Remove what tells of an earlier run, and would contradict the checkpoint until the new one ends."""
    for name in ("run.csv", "run.json", "run.png"):
        try:
            (out / name).unlink(missing_ok=True)
        except OSError as error:
            raise DataError(f"{out / name} cannot be removed ({error.strerror}): choose another folder") from error


def _describe(trainer: Trainer) -> str:
    s, data = trainer.settings, trainer.data
    c, h, w = data.image_shape
    size = sum(p.numel() for p in trainer.model.parameters())
    begun = f", going on after step {len(trainer.history.steps)}" if len(trainer.history.steps) else ""
    return (
        f"{s.data}: {trainer.images} + {len(data.y_test)} images {h}×{w}×{c}, {data.classes} classes; CNN of {size:,} "
        f"parameters on {s.device}; {s.penalty}; batch {s.batch_size}, seed {s.seed}{begun}"
    )


def _show(bar, row: dict[str, float]) -> None:
    bar.set_postfix(
        loss=tables.number(row["loss"], 3),
        Γ=tables.number(row["covariance_trace"], 3),
        noise=tables.number(row["noise_scale"], 3),
        refresh=False,
    )
    bar.update()


def _verify(trainer: Trainer) -> None:
    x, y = (t[:_CHECKED_SAMPLES].to(trainer.device) for t in (trainer.data.x_train, trainer.data.y_train))
    if not bootgrad.verify(trainer.model, lambda x, y: F.cross_entropy(trainer.model(x), y, reduction="none"), x, y).ok:
        raise TrainingError("bootgrad differs from plain autograd on these images: see the table above, and report it")


def _write(trainer: Trainer, out: Path) -> None:
    s = trainer.settings
    trainer.history.write_csv(out / "run.csv")
    ours, plain = trainer.cost
    record = {
        "status": "finished" if trainer.is_finished else "interrupted",
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "settings": s.as_dict(),
        "seed": s.seed,
        "data": {
            "image_shape": list(trainer.data.image_shape),
            "classes": trainer.data.classes,
            "train": trainer.images,
            "test": len(trainer.data.y_test),
            "fingerprint": trainer.data.fingerprint,
        },
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "device": device_info(trainer.device),
        "versions": versions(),
        "steps": len(trainer.history.steps),
        "epochs": trainer.history.epoch_rows(),
        "noise_scale": finite(trainer.noise_scale.value),
        "noise_scale_reason": trainer.noise_scale.reason,
        "seconds_per_step": {
            "this": finite(ours),
            "plain": finite(plain),
            "ratio": finite(ours / plain),
            "pairs": len(trainer.history.pairs),
        },
    }
    with checkpoint.replacing(out / "run.json") as file:
        file.write((json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())
    if len(trainer.history.steps):
        draw_run(trainer.history, f"{s.data}, {s.penalty}, batch {s.batch_size}", out / "run.png")


def _write_comparison(runs: Mapping[str, Trainer], path: Path) -> None:
    rows = [[name, *run.history.epochs.fields(k)] for name, run in runs.items() for k in range(len(run.history.epochs))]
    write_csv(path, ["variant", *EPOCH_COLUMNS], rows)
