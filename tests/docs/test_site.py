"""The documentation site builds without a warning, its links lead somewhere, and its pages load nothing from elsewhere."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

import pytest
import yaml

from .test_blocks import ROOT


class Page(HTMLParser):
    """Where a page links to, what it loads, and the anchors that it has."""

    def __init__(self, text: str):
        super().__init__()
        self.links, self.loads, self.anchors, self.images_without_text = [], [], set(), []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.anchors.update(found[name] for name in ("id", "name") if found.get(name))
        if tag == "a" and found.get("href"):
            self.links.append(found["href"])
        if tag in ("script", "img", "iframe", "source") and found.get("src"):
            self.loads.append(found["src"])
        if tag == "link" and found.get("rel") in ("stylesheet", "preload", "icon", "modulepreload"):
            self.loads.append(found["href"])
        if tag == "img" and not found.get("alt"):
            self.images_without_text.append(found.get("src"))


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", folder],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert built.returncode == 0 and "WARNING" not in built.stdout, built.stdout
    return {
        path.relative_to(folder).as_posix(): Page(path.read_text(encoding="utf-8")) for path in html(folder)
    }, folder


def html(folder: Path):
    return (path for path in folder.rglob("*.html") if path.name != "404.html")


def test_links_lead_to_pages_and_anchors(site):
    pages, folder = site
    wrong = []
    for name, page in pages.items():
        for link in [*page.links, *page.loads]:
            if urlsplit(link).scheme in ("https", "http", "mailto", "data", "javascript"):
                continue
            path, anchor = urldefrag(link)
            target = (folder / name).parent / unquote(path) if path else folder / name
            target = target / "index.html" if target.is_dir() else target
            key = os.path.relpath(target.resolve(), folder.resolve())
            if not target.is_file() or (anchor and key in pages and unquote(anchor) not in pages[key].anchors):
                wrong.append(f"{name}: {link}")
    assert len(pages) > 30 and wrong == []


def test_pages_load_nothing_from_elsewhere(site):
    for name, page in site[0].items():
        if not name.startswith("tutorials/"):  # notebooks may show formulas by a script of their renderer
            assert [load for load in page.loads if urlsplit(load).netloc] == [], name


def test_images_have_a_text(site):
    for name, page in site[0].items():
        if not name.startswith("tutorials/"):
            assert page.images_without_text == [], name


def test_links_to_elsewhere_are_whole(site):
    for name, page in site[0].items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme in ("http", "https"):
                assert parts.scheme == "https" and re.fullmatch(r"[\w.-]+\.\w+", parts.netloc), f"{name}: {link}"


def test_every_page_is_in_the_navigation_once():
    class Loader(yaml.SafeLoader):
        """Reads past what only MkDocs understands."""

    Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: None)
    nav = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Loader)["nav"]  # noqa: S506 — our own file

    def leaves(entry):
        if isinstance(entry, str):
            return [entry]
        return [page for part in (entry.values() if isinstance(entry, dict) else entry) for page in leaves(part)]

    pages = leaves(nav)
    assert len(pages) == len(set(pages))
    written = {
        p.relative_to(ROOT / "docs").as_posix() for kind in ("md", "ipynb") for p in (ROOT / "docs").rglob(f"*.{kind}")
    }
    assert written <= set(pages)
