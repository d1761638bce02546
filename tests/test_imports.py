"""The direction of imports, read from the syntax trees: every module imports from its own line of the table or below.

A new module fails the test until it is given a place in the table: on the lowest line whose modules it needs.
"""

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# From the top down. A package stands for all its modules that have no line of their own.
LAYERS = (
    ("cli", "experiments", "diagnosis", "monitoring", "integrations", "training"),
    ("theory",),
    ("regularizers", "verification", "normalization", "recurrent", "plans", "plan_timing"),
    ("methods", "second_pass", "steps", "center_pairs", "strengths", "strength_pairs", "seen"),
    ("penalties", "micro_batches"),
    ("statistics",),
    ("per_sample", "centers", "per_sample_pass"),
    ("compiled",),
    ("traced",),
    ("recording", "batch_check", "derived", "graph", "grads", "scaling", "running_mean", "rank_statistics", "wrappers"),
    ("rules",),
    ("ops",),
    ("ops.backends", "ops.library"),
    ("kernels",),
    ("planning", "costs", "plan_tables"),
    ("distributed",),
    ("ops.schema", "errors", "reference", "heap", "noise_scale", "intervals", "modes", "waiting"),
)
ABOVE_ALL = {"bootgrad", "bootgrad.__main__"}
USERS = set(LAYERS[0])  # of the public names: only they, too, import from bootgrad itself
MAY_IMPORT_REFERENCE = {"bootgrad.verification"}  # the oracle is slow: never part of a computation
FORBIDDEN = {"tests", "benchmarks"}
# What a module may import beside the standard library and bootgrad; of a package, the first line that fits counts.
THIRD_PARTY = (
    ("kernels", {"torch", "triton"}),
    ("planning", set()),
    ("costs", set()),
    ("plan_tables", set()),
    ("noise_scale", set()),
    ("intervals", set()),
    ("cli", {"torch", "numpy", "tqdm", "matplotlib"}),
    ("experiments", {"torch", "numpy", "tqdm", "matplotlib"}),
    ("integrations", {"torch", "accelerate", "lightning", "peft", "skorch", "transformers"}),
    ("training", {"torch", "numpy", "tqdm", "matplotlib", "sklearn", "torchvision"}),
    ("", {"torch"}),
)


def modules_of(root: Path) -> dict[str, str]:
    """Module → source of the package as it is installed: ``kernels`` below ``bootgrad``."""
    found = {}
    for folder, prefix in (("bootgrad", ""), ("kernels", "bootgrad.")):
        for path in sorted((root / folder).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            found[prefix + ".".join(parts).removesuffix(".__init__")] = path.read_text(encoding="utf-8")
    return found


def imports_of(name: str, source: str, modules) -> list[str]:
    """What a module imports, absolute: modules of ``modules`` by their full name, others as they are written."""
    is_package = any(other.startswith(f"{name}.") for other in modules) or name == "bootgrad"
    package = name.split(".") if is_package else name.split(".")[:-1]
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *filter(None, [node.module])])
            members = [f"{origin}.{alias.name}" for alias in node.names]
            found += [member if member in modules else origin for member in members]
    return list(dict.fromkeys(found))


def layer_of(name: str) -> int | None:
    """The line of the table, counted from the bottom; None for a module that has none."""
    parts = name.split(".")[1:]
    for length in range(len(parts), 0, -1):
        for height, layer in enumerate(reversed(LAYERS)):
            if ".".join(parts[:length]) in layer:
                return height
    return None


def third_party(name: str) -> set[str]:
    stem = name.removeprefix("bootgrad").removeprefix(".")
    return next(allowed for prefix, allowed in THIRD_PARTY if not prefix or f"{stem}.".startswith(f"{prefix}."))


def violations(modules: dict[str, str]) -> list[str]:
    """Every import against the rules, and every module without a place, in words."""
    found, graph = [], {}
    for name, source in modules.items():
        imported = imports_of(name, source, modules)
        graph[name] = [target for target in imported if target in modules]
        height = len(LAYERS) if name in ABOVE_ALL else layer_of(name)
        if height is None:
            found.append(f"{name} has no place: add it to LAYERS in tests/test_imports.py, as low as its imports allow")
            continue
        for target in imported:
            root = target.split(".")[0]
            if root in FORBIDDEN:
                found.append(f"{name} imports {target}")
            elif root != "bootgrad":
                if root not in sys.stdlib_module_names | third_party(name):
                    found.append(f"{name} imports {target}, which THIRD_PARTY does not allow it")
            elif target == "bootgrad.reference" and name not in MAY_IMPORT_REFERENCE:
                found.append(f"{name} imports the oracle")
            elif target in ABOVE_ALL:
                if name not in ABOVE_ALL and name.split(".")[1] not in USERS:
                    found.append(f"{name} imports from {target} itself, not from the module that has the name")
            elif (layer_of(target) or 0) > height:
                found.append(f"{name} imports {target}, which lies above it")
    return found + [f"import cycle: {' → '.join(cycle)}" for cycle in cycles(graph)]


def cycles(graph: dict[str, list[str]]) -> list[list[str]]:
    """One cycle for each way back that a walk from the first module meets."""
    found, done, trail = [], set(), []

    def walk(name):
        if name in trail:
            found.append([*trail[trail.index(name) :], name])
        elif name not in done:
            trail.append(name)
            for target in graph[name]:
                walk(target)
            done.add(trail.pop())

    for name in graph:
        walk(name)
    return found


def test_imports_run_one_way():
    modules = modules_of(ROOT)
    assert {"bootgrad", "bootgrad.ops.schema", "bootgrad.kernels.linear_rank1_sq_norms"} <= modules.keys()
    assert violations(modules) == []


def test_each_rule_finds_its_violation():
    good = {
        "bootgrad": "from .statistics import record",
        "bootgrad.statistics": "import torch\nfrom .rules.base import rule",
        "bootgrad.rules": "from . import base, linear",
        "bootgrad.rules.base": "from ..ops.schema import check",
        "bootgrad.rules.linear": "from .base import rule",
        "bootgrad.ops": "from . import backends",
        "bootgrad.ops.schema": "import torch",
        "bootgrad.ops.backends": "",
        "bootgrad.ops.backends.triton": "def late():\n    from ...kernels.product import launch",
        "bootgrad.kernels": "",
        "bootgrad.kernels.product": "import triton.language as tl",
        "bootgrad.planning": "import math",
        "bootgrad.cli": "from . import record",
        "bootgrad.reference": "import torch",
    }
    assert violations(good) == []
    for name, source, message in (
        (
            "ops.schema",
            "from ..rules.base import rule",
            "bootgrad.ops.schema imports bootgrad.rules.base, which lies above it",
        ),
        ("ops.backends", "import bootgrad.statistics", "bootgrad.ops.backends imports bootgrad.statistics, which lies"),
        (
            "kernels.product",
            "from ..ops import backends",
            "bootgrad.kernels.product imports bootgrad.ops.backends, which lies",
        ),
        ("kernels.product", "import numpy", "bootgrad.kernels.product imports numpy, which THIRD_PARTY does not"),
        ("ops.schema", "import triton", "bootgrad.ops.schema imports triton, which THIRD_PARTY does not"),
        ("planning", "import torch", "bootgrad.planning imports torch, which THIRD_PARTY does not"),
        ("statistics", "from . import reference", "bootgrad.statistics imports the oracle"),
        ("statistics", "from . import record", "bootgrad.statistics imports from bootgrad itself"),
        ("statistics", "from tests.models import make", "bootgrad.statistics imports tests.models"),
        (
            "rules.base",
            "from . import linear",
            "import cycle: bootgrad.rules.base → bootgrad.rules.linear → bootgrad.rules.base",
        ),
        ("novelty", "", "bootgrad.novelty has no place: add it to LAYERS"),
    ):
        found = violations(good | {f"bootgrad.{name}": source})
        assert any(line.startswith(message) for line in found), found


def test_kernels_in_cpp_know_nothing_of_torch():
    headers = [path for path in (ROOT / "csrc/include").rglob("*") if path.is_file()]
    assert {path.suffix for path in headers} <= {".cuh", ".hpp", ".h"}
    assert ROOT / "csrc/include/bootgrad/device.cuh" in headers
    for path in headers:
        text = path.read_text(encoding="utf-8")
        for included in re.findall(r'^\s*#\s*include\s*["<]([^">]+)', text, re.MULTILINE):
            assert re.match(r"(torch|ATen|c10|caffe2)\b", included) is None, f"{path} includes {included}"
        assert "<<<" not in text, f"{path} launches a kernel: that is csrc/cuda's part"
