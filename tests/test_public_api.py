"""The public API is what tests/public_api.txt says: names, signatures, fields, all annotated.

A change to it fails until it is written down, by ``BOOTGRAD_WRITE_API=1 pytest tests/test_public_api.py``, and so is seen in
review; docs/stability.md has what may change when.
"""

import dataclasses
import inspect
import os
import re
from pathlib import Path

import pytest

import bootgrad
import bootgrad.centers
import bootgrad.errors
import bootgrad.planning

ROOT = Path(__file__).parents[1]
SNAPSHOT = ROOT / "tests/public_api.txt"
MODULES = ("bootgrad", "bootgrad.centers", "bootgrad.errors", "bootgrad.ops", "bootgrad.planning")
MODULES += ("bootgrad.strengths", "bootgrad.theory", "bootgrad.monitoring")
MODULES += tuple(f"bootgrad.integrations.{name}" for name in ("accelerate", "lightning", "skorch", "transformers"))


def reference() -> str:
    """The pages of the API reference."""
    return "\n".join(p.read_text(encoding="utf-8") for p in sorted((ROOT / "docs/api").glob("*.md")))


def public_names(module) -> list[str]:
    """``__all__``, or what the module itself defines."""
    if hasattr(module, "__all__"):
        return sorted(module.__all__)
    own = (name for name, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__)
    return sorted(name for name in own if not name.startswith("_"))


def members(cls: type, path: str):
    """Public methods and properties with what is called to use the class, those of our own bases too."""
    found = {}
    for base in reversed(cls.__mro__):
        if base.__module__.startswith("bootgrad"):
            found |= vars(base)
    chosen = re.search(rf"^::: {re.escape(path)}\n +options: .*members: \[(.*?)\]", reference(), re.MULTILINE)
    if chosen:  # by name, where bases have more that is called within the library
        found = {name: found[name] for name in ("__init__", "__enter__", "__exit__", *chosen[1].split(", "))}
    for name, value in sorted(found.items()):
        is_used = not name.startswith("_") or name in ("__init__", "__getitem__", "__matmul__", "__enter__", "__exit__")
        is_protocols = getattr(value, "__module__", "") == "typing"
        if (
            is_used
            and not is_protocols
            and (callable(value) or isinstance(value, property | staticmethod | classmethod))
        ):
            yield name, value


def signature(function) -> str:
    """With annotations as they are written, and defaults without addresses."""
    return re.sub(r" at 0x[0-9a-f]+", "", str(inspect.signature(function)))


def described() -> tuple[list[str], list[str]]:
    """A line for each name, and what has no annotation."""
    lines, bare = [], []

    def add(name, function):
        function = getattr(function, "__func__", function)
        lines.append(f"{name}{signature(function)}")
        parameters = list(inspect.signature(function).parameters.values())
        for p in parameters:
            if p.annotation is p.empty and p.name not in ("self", "cls"):
                bare.append(f"{name}: {p.name}")
        if inspect.signature(function).return_annotation is inspect.Signature.empty and not name.endswith("__init__"):
            bare.append(f"{name}: what it returns")

    for module_name in MODULES:
        module = __import__(module_name, fromlist=["_"])
        for name in public_names(module):
            value, path = getattr(module, name), f"{module_name}.{name}"
            if inspect.ismodule(value):
                lines.append(f"{path}: module")
            elif isinstance(value, type):
                bases = ", ".join(b.__name__ for b in value.__bases__ if b is not object)
                lines.append(f"{path}({bases}): class")
                if dataclasses.is_dataclass(value):
                    lines.extend(f"{path}.{f.name}: {f.type}" for f in dataclasses.fields(value))
                for member, function in members(value, path):
                    if isinstance(function, property):
                        returned = inspect.signature(function.fget).return_annotation
                        lines.append(f"{path}.{member}: {inspect.formatannotation(returned)}")
                    elif not (member == "__init__" and dataclasses.is_dataclass(value)):
                        add(f"{path}.{member}", function)
            elif callable(value):
                add(path, value)
            else:
                lines.append(f"{path}: {type(value).__name__}")
    return lines, bare


@pytest.mark.parametrize("name", MODULES)
def test_public_names_are_documented(name):
    module = __import__(name, fromlist=["_"])
    for public in public_names(module):
        value = getattr(module, public)
        assert not callable(value) or inspect.getdoc(value), f"{name}.{public}"


def test_the_public_api_is_the_acknowledged_one():
    text = "\n".join(described()[0]) + "\n"
    if os.environ.get("BOOTGRAD_WRITE_API"):
        SNAPSHOT.write_text(text, encoding="utf-8")
    assert SNAPSHOT.read_text(encoding="utf-8") == text, "the public API has changed: see this file's first lines"


def test_all_of_it_is_annotated():
    assert described()[1] == []


def test_every_public_name_is_on_a_page_of_the_reference():
    shown = set(re.findall(r"^::: (\S+)", reference(), re.MULTILINE))
    for name in bootgrad.__all__:
        module = getattr(getattr(bootgrad, name), "__module__", "")
        assert {f"bootgrad.{name}", module} & shown, f"docs/api has no `::: bootgrad.{name}`"
