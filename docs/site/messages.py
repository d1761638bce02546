"""Every message that bootgrad raises or warns with, read from its source: what docs/troubleshooting.md must explain.

A message is a template, with … for what is filled in when it is raised.
"""

import ast
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
ERRORS = ("ArgumentError", "ArgumentTypeError", "RecordingError", "UnsupportedError", "DistributedError", "DataError")


@dataclass(frozen=True)
class Message:
    """One message: its class, its text as a template, and the file that has it."""

    kind: str
    text: str
    file: str


def messages() -> list[Message]:
    """All of the package, in the order of files and lines."""
    found = []
    for path in sorted((ROOT / "bootgrad").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        constants = {
            target.id: node.value
            for node in ast.walk(tree)
            if isinstance(node, ast.Assign)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        for node in ast.walk(tree):
            kind = _kind(node)
            if kind and node.args:
                text = _template(node.args[0], constants)
                if text.strip("… "):
                    found.append(Message(kind, text, path.relative_to(ROOT).as_posix()))
    return found


def _kind(node: ast.AST) -> str:
    if not isinstance(node, ast.Call):
        return ""
    name = getattr(node.func, "id", getattr(node.func, "attr", ""))
    return name if name in ERRORS else "warning" if name in ("warn", "_warn_once") else ""


def _template(node: ast.AST, constants: dict[str, ast.AST]) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(_template(part, constants) for part in node.values)
    if isinstance(node, ast.FormattedValue) and isinstance(node.value, ast.Name) and node.value.id.isupper():
        return _template(node.value, constants)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _template(node.left, constants) + _template(node.right, constants)
    if isinstance(node, ast.Name) and node.id in constants and node.id.isupper():
        return _template(constants[node.id], constants)
    return "…"
