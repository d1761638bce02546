"""The command line: ``bootgrad train``, ``compare``, ``experiment``, ``diagnose``, ``report``, ``plan`` and ``info``.

A mistake of the user's ends in one line, ``bootgrad: error: …``, and exit code 2; Ctrl-C in exit code 130.
"""

import argparse
import importlib.util
import io
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from .errors import ArgumentError, BootgradError, BootgradWarning

_OPTIONS = (
    ("--data", str, "SOURCE", "digits (scikit-learn's, no download), an NPZ file with x_train, y_train, x_test, "
     "y_test, a folder with MNIST's four IDX files, or torchvision:NAME"),
    ("--data-root", str, "DIR", "where torchvision keeps its downloads"),
    ("--train-size", int, "N", "use the first N training images only"),
    ("--reg1", float, "F", "λ₁, the factor of Reg1 = (1/B) Σ ‖g_i − c‖²"),
    ("--reg2", float, "F", "λ₂, the factor of Reg2 = ‖ḡ − c‖²"),
    ("--center", str, "NAME", "c: batch_mean, zero, ema or window; two with a comma between for Reg1 and Reg2"),
    ("--method", str, "NAME", "how the penalties' gradient is made: exact; finite_difference, by one more pass at displaced "
     "parameters; random_signs, an unbiased estimate; auto, the cheapest exact one"),
    ("--probes", int, "N", "vectors of signs that random_signs averages over"),
    ("--derivative", str, "NAME", "of random_signs: exact, by double backward, or finite_difference, by first-order passes"),
    ("--epsilon", float, "F", "length of a finite step relative to the parameters' norm; default: 0.0001"),
    ("--fraction", float, "F", "share of each batch, chosen at random, that the penalties are taken on"),
    ("--every", int, "K", "take the penalties on every K-th step, K times as strong"),
    ("--epochs", int, "N", "passes over the training images"),
    ("--batch-size", int, "N", "images in a batch"),
    ("--optimizer", str, "NAME", "adam or sgd"),
    ("--lr", float, "F", "learning rate"),
    ("--momentum", float, "F", "of sgd; β₁ of adam"),
    ("--seed", int, "N", "of the initial weights and of the order of the images"),
    ("--threads", int, "N", "threads of torch's CPU kernels"),
    ("--device", str, "NAME", "cpu, cuda or cuda:N"),
)  # fmt: skip
_DTYPES = ("float32", "float64", "float16", "bfloat16", "int64", "int32")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal without Γ and λ shows ? in their place
            stream.reconfigure(errors="replace")
    try:
        arguments = _parser().parse_args(argv)
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            code = arguments.run(arguments)
        sys.stdout.flush()
        return code
    except BootgradError as error:
        print(f"bootgrad: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("bootgrad: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader has gone, as in ``bootgrad info | head -1``
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise ArgumentError(f"{message} (see {self.prog} --help)")


def _parser() -> argparse.ArgumentParser:
    from . import __version__

    parser = _Parser(prog="bootgrad", description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"bootgrad {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    train = _command(commands, "train", _train, "train the reference CNN and measure its gradients' noise")
    _add_settings(train)
    train.add_argument("--out", metavar="DIR", help="folder of the run; default: run, or the checkpoint's folder")
    train.add_argument(
        "--resume", nargs="?", const="", metavar="CKPT", help="go on from a checkpoint; default: that in --out"
    )
    train.add_argument("--overwrite", action="store_true", help="replace a run that --out holds")
    train.add_argument(
        "--check", action="store_true", help="first compare the library with plain autograd on a few images"
    )

    compare = _command(commands, "compare", _compare, "train plainly, with Reg1 and with Reg1 + Reg2, side by side")
    _add_settings(compare)
    compare.add_argument(
        "--out", metavar="DIR", default="comparison", help="folder of the picture, the table and the runs"
    )
    either = compare.add_mutually_exclusive_group()
    either.add_argument("--resume", action="store_true", help="go on with the runs that --out holds")
    either.add_argument("--overwrite", action="store_true", help="replace the runs that --out holds")

    experiment = _command(commands, "experiment", _experiment, "run an experiment of the paper, or list them")
    experiment.add_argument("name", metavar="NAME", help="of the experiment; list shows them all")
    form = experiment.add_mutually_exclusive_group()
    form.add_argument("--quick", action="store_true", help="in a minute or two; the default")
    form.add_argument(
        "--full", action="store_true", help="in up to an hour; one that is stopped goes on by the same command"
    )
    experiment.add_argument("--seeds", type=int, default=5, metavar="N", help="runs of each kind; default: 5")
    experiment.add_argument("--data", metavar="SOURCE", help="images, as for train; default: the experiment's own")
    experiment.add_argument("--threads", type=int, metavar="N", help="threads of torch's CPU kernels")
    experiment.add_argument("--out", metavar="DIR", help="folder of the results; default: experiments/NAME")
    experiment.add_argument("--overwrite", action="store_true", help="start anew what --out holds")

    diagnosis = _command(commands, "diagnose", _diagnose, "look for signatures of failure in what a run has left")
    diagnosis.add_argument("folder", metavar="RUN_DIR", help="the --out of train, compare or experiment")

    page = _command(
        commands, "report", _report, "write what a run has left as one page for a browser, without a network"
    )
    page.add_argument(
        "folder",
        metavar="RUN_DIR",
        help="the --out of train, compare or experiment, a Monitor's folder, or a JSONL or CSV file of one",
    )
    page.add_argument(
        "--out", metavar="FILE", help="the page; default: report.html in the folder, or beside a file FILE.html"
    )

    plan = _command(commands, "plan", _plan, "predict what each layer's norms and each kind of step cost, and why")
    plan.add_argument("model", metavar="FILE.py:FUNCTION", help="a function without arguments that returns the model")
    plan.add_argument("--batch", type=int, default=128, metavar="N", help="samples in a batch")
    plan.add_argument("--input", required=True, metavar="1x28x28", help="shape of one sample")
    plan.add_argument("--dtype", choices=_DTYPES, default="float32", help="type of the samples; default: float32")
    plan.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="cuda adds what would run each op on a GPU"
    )
    plan.add_argument(
        "--precision",
        choices=_DTYPES[:4],
        help="type of the layers' inputs on the GPU, as under autocast; default: --dtype, where that is one",
    )
    plan.add_argument(
        "--measure", action="store_true", help="put measured times beside the predicted ones, in seconds to minutes"
    )

    _command(commands, "info", _info, "show versions, and what is built, loaded and used")
    return parser


def _command(commands, name: str, run, text: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".", allow_abbrev=False)
    parser.set_defaults(run=run)
    return parser


def _add_settings(parser: argparse.ArgumentParser) -> None:
    from .training.settings import Settings

    for option, kind, metavar, text in _OPTIONS:
        name = option[2:].replace("-", "_")
        default = getattr(Settings, name)
        shown = "" if default is None else f"; default: {default}"
        parser.add_argument(
            option, type=kind, default=argparse.SUPPRESS, metavar=metavar, help=(text + shown).replace("%", "%%")
        )


def _settings_given(arguments: argparse.Namespace) -> dict:
    names = [option[2:].replace("-", "_") for option, *_ in _OPTIONS]
    return {name: getattr(arguments, name) for name in names if hasattr(arguments, name)}


def _train(arguments: argparse.Namespace) -> int:
    _require_extras()
    from .training import run

    resume = out = None
    if arguments.resume is not None:
        resume = Path(arguments.resume) if arguments.resume else Path(arguments.out or "run") / run.CHECKPOINT
    out = Path(arguments.out or (resume.parent if resume else "run"))
    trainer, finished = run.train(
        _settings_given(arguments), out, resume=resume, overwrite=arguments.overwrite, check=arguments.check
    )
    if not finished:
        print(
            f"bootgrad: interrupted after step {len(trainer.history.steps)}; the checkpoint is {out / run.CHECKPOINT}: "
            f"go on with bootgrad train --resume --out {out}",
            file=sys.stderr,
        )
        return 130
    print(f"written: {', '.join(str(out / name) for name in ('run.csv', 'run.json', 'run.png', run.CHECKPOINT))}")
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    _require_extras()
    from .training import run

    out = Path(arguments.out)
    if run.compare(_settings_given(arguments), out, resume=arguments.resume, overwrite=arguments.overwrite):
        return 0
    print(f"bootgrad: interrupted: go on with the same options and --resume --out {out}", file=sys.stderr)
    return 130


def _experiment(arguments: argparse.Namespace) -> int:
    _require_extras()
    from .experiments.conduct import conduct, listing
    from .experiments.study import Options

    name = arguments.name
    if name == "list":
        print(listing())
        return 0
    chosen = Options(name, arguments.full, arguments.seeds, arguments.data, arguments.threads)
    out = Path(arguments.out or Path("experiments", name))
    try:
        summary = conduct(chosen, out, overwrite=arguments.overwrite)
    except KeyboardInterrupt:
        options = "the same options, without --overwrite" if arguments.overwrite else "the same options"
        print(f"bootgrad: interrupted: go on with {options}; {out} holds what has been run", file=sys.stderr)
        return 130
    print(summary.read_text(encoding="utf-8"))
    print(f"written: {', '.join(str(out / file) for file in ('results.csv', 'summary.md', 'figure.png'))}")
    return 0


def _diagnose(arguments: argparse.Namespace) -> int:
    _require_extras()
    from .diagnosis import diagnose

    found = diagnose(arguments.folder)
    print("\n\n".join(map(str, found)) if found else f"{arguments.folder}: no signature of failure was found")
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from .monitoring.report import write_report

    print(f"written: {write_report(arguments.folder, arguments.out)}")
    return 0


def _plan(arguments: argparse.Namespace) -> int:
    import torch

    from . import plan

    if not 1 <= arguments.batch <= 1 << 20:
        raise ArgumentError(f"--batch must be a whole number in 1…2²⁰; got {arguments.batch}")
    shape = _shape(arguments.input)
    model = _load_model(arguments.model)
    precision = arguments.precision or (arguments.dtype if arguments.dtype in _DTYPES[:4] else "float32")
    # Shapes are all that a plan needs; times are those of numbers that are not all alike.
    kind = getattr(torch, arguments.dtype)
    example = torch.zeros(arguments.batch, *shape, dtype=kind)
    if arguments.measure and kind.is_floating_point:
        example.uniform_()
    if arguments.device == "cuda" and torch.cuda.is_available():
        model, example = model.cuda(), example.cuda()
    try:
        with torch.no_grad():
            model(example[:2])  # whether types fit is not seen from shapes, by which a plan is made
        result = plan(model, example, device=arguments.device, precision=precision, measure=arguments.measure)
    except BootgradError:
        raise
    except Exception as error:  # the user's own code may raise anything
        raise ArgumentError(
            f"the model of {arguments.model} fails on an input {(arguments.batch, *shape)} of {arguments.dtype} "
            f"({type(error).__name__}: {error}): give --input the shape of one sample, and --dtype its type"
        ) from error
    print(f"{arguments.model}: batch {arguments.batch}, input {'×'.join(map(str, shape))}\n")
    print(result)
    return 0


def _shape(text: str) -> tuple[int, ...]:
    sizes = text.lower().split("x")
    if not all(size.isascii() and size.isdigit() and len(size) < 7 and int(size) > 0 for size in sizes):
        raise ArgumentError(f"--input must be sizes with x between, such as 1x28x28; got {text!r}")
    return tuple(map(int, sizes))


def _load_model(text: str):
    from torch import nn

    file, _, function = text.rpartition(":")
    if not file or not function:
        raise ArgumentError(f"the model must be given as FILE.py:FUNCTION; got {text!r}")
    if not file.endswith(".py") or not os.path.isfile(file):
        raise ArgumentError(f"there is no Python file {file!r}: check the path")
    spec = importlib.util.spec_from_file_location("_bootgrad_plan", file)
    if spec is None or spec.loader is None:
        raise ArgumentError(f"{file!r} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    sys.path.insert(0, str(Path(file).resolve().parent))  # as under ``python FILE.py``
    try:
        spec.loader.exec_module(module)
        make = getattr(module, function, None)
        model = make() if callable(make) else None
    except (Exception, SystemExit) as error:  # the user's own code may raise anything
        raise ArgumentError(f"{text} could not be run ({type(error).__name__}: {error})") from error
    if make is None:
        raise ArgumentError(f"{file} has no function {function!r}")
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"{text} must return a torch.nn.Module; got {type(model).__name__}")
    return model


def _info(arguments: argparse.Namespace) -> int:
    import torch

    from .ops.backends.gpu import describe
    from .ops.library import build_info
    from .training.environment import processor_name, versions

    for name, value in {**versions(), "processor": processor_name()}.items():
        print(f"{name:14}{'not installed' if value is None else value}")
    for library in build_info():
        built = "built" if library.built else "not built"
        used = f"loaded and used{f' ({library.isa})' if library.isa else ''}" if library.loaded else "not used"
        print(f"{library.name:14}{', '.join(dict.fromkeys(filter(None, (built, used, library.reason))))}")
    if torch.cuda.is_available():
        print(f"\nwhat {torch.cuda.get_device_name()} runs")
        for name, by_dtype in describe().items():
            print(f"{name:32}" + "  ".join(f"{dtype} {backend}" for dtype, backend in by_dtype.items()))
    return 0


def _require_extras() -> None:
    missing = [name for name in ("tqdm", "matplotlib") if importlib.util.find_spec(name) is None]
    if missing:
        raise ArgumentError(f"this command needs {' and '.join(missing)}: pip install 'bootgrad[cli]'")


def _show_warning(message, category, filename, lineno, file=None, line=None) -> None:
    origin = "" if issubclass(category, BootgradWarning) else f" ({filename}:{lineno})"
    print(f"bootgrad: warning: {message}{origin}", file=sys.stderr)
