"""docs/troubleshooting.md explains every message but those of wrong arguments and files, and quotes none that is not there."""

import importlib.util
import sys

from .test_blocks import ROOT, blocks

PAGE = ROOT / "docs/troubleshooting.md"
PLAIN = ("ArgumentError", "ArgumentTypeError", "DataError")  # "x must be y; got z: do w": nothing is left to explain


def messages():
    spec = importlib.util.spec_from_file_location("messages_of_bootgrad", ROOT / "docs/site/messages.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module.messages()


def quotes() -> list[str]:
    return [line for _, block in blocks(PAGE, "text") for line in block.splitlines()]


def test_every_message_is_explained():
    found, explained = messages(), quotes()
    assert len(found) > 300
    unexplained = [m for m in found if m.kind not in PLAIN and not any(quote in m.text for quote in explained)]
    assert [f"{m.file}: {m.text}" for m in unexplained] == []


def test_every_quote_is_of_a_message():
    texts, explained = [m.text for m in messages()], quotes()
    assert len(explained) > 80 and len(explained) == len(set(explained)) and min(map(len, explained)) >= 12
    assert [quote for quote in explained if not any(quote in text for text in texts)] == []
