"""Frameworks are imported where they are asked for, and missed by name."""

import importlib
import subprocess
import sys

import pytest

from bootgrad.errors import BootgradError
from bootgrad.integrations.required import MissingPackageError, missing

FRAMEWORKS = ("lightning", "transformers", "accelerate", "skorch")


def test_the_library_imports_none_of_them():
    code = "import sys, bootgrad, bootgrad.integrations, bootgrad.integrations.loops\n"
    code += f"print([name for name in {FRAMEWORKS + ('peft', 'pytorch_lightning')} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_one_that_is_not_installed_is_named_with_what_installs_it(name, monkeypatch):
    for module in list(sys.modules):
        if module.partition(".")[0] == name or module == f"bootgrad.integrations.{name}":
            monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, name, None)  # which import takes for a package that is not there
    with pytest.raises(MissingPackageError, match=f"pip install {name}$") as raised:
        importlib.import_module(f"bootgrad.integrations.{name}")
    assert isinstance(raised.value, ImportError) and isinstance(raised.value, BootgradError)


def test_what_a_framework_lacks_itself_is_its_own_error():
    error = ModuleNotFoundError("No module named 'rich'", name="rich")
    assert missing("lightning", error) is error
