"""What MkDocs is told beside mkdocs.yml: pages and results that lie outside of docs/ belong to the site, too.

Links in Markdown are those of the checkout, where ``docs/experiments.md`` points to ``../benchmarks/results/…``. In the site
the same files lie elsewhere, so links are rewritten by where their target lies in the checkout, and nothing is written twice.
"""

import posixpath
import re
import sys
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[2]
# path in the checkout: path in the site
PAGES = {
    "README.md": "overview.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
    "LICENSE": "LICENSE.txt",
}
RESULTS = "benchmarks/results"
LINK = re.compile(r"(?<=\]\()([^)\s#]+)(#[^)\s]*)?(?=\))")


def on_files(files, config):
    """Add what lies outside of docs/."""
    for source, target in PAGES.items():
        files.append(File.generated(config, target, abs_src_path=str(ROOT / source)))
    for path in sorted((ROOT / RESULTS).rglob("*")):
        if path.suffix in (".md", ".png", ".csv", ".json"):
            target = posixpath.join("results", path.relative_to(ROOT / RESULTS).as_posix())
            files.append(File.generated(config, target, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Point links at the site's paths, and list the messages where they are asked for."""
    here = page.file.src_uri
    origin = _in_checkout(here)
    folder = posixpath.dirname(origin)

    def moved(match):
        target, anchor = match.group(1), match.group(2) or ""
        if "://" in target or target.startswith("mailto:"):
            return match.group(0)
        site = _in_site(posixpath.normpath(posixpath.join(folder, target)))
        return target + anchor if site is None else posixpath.relpath(site, posixpath.dirname(here) or ".") + anchor

    return LINK.sub(moved, markdown).replace("<!-- messages -->", _messages())


def _messages() -> str:
    sys.path.insert(0, str(Path(__file__).parent))
    from messages import messages

    kinds: dict[str, dict[str, None]] = {}
    for message in messages():
        kinds.setdefault(message.kind, {})[message.text] = None
    sections = (f"### {kind}\n\n" + "\n".join(f"- {_escaped(text)}" for text in kinds[kind]) for kind in sorted(kinds))
    return "\n\n".join(sections)


def _escaped(text: str) -> str:
    return re.sub(r"([\\`*_{}\[\]<>#|])", r"\\\1", text)


def _in_checkout(site: str) -> str:
    for source, target in PAGES.items():
        if site == target:
            return source
    return RESULTS + site.removeprefix("results") if site.startswith("results/") else f"docs/{site}"


def _in_site(path: str) -> str | None:
    """Where a file of the checkout lies in the site; None for one that does not."""
    if path in PAGES:
        return PAGES[path]
    if path.startswith(f"{RESULTS}/"):
        return "results" + path.removeprefix(RESULTS)
    return path.removeprefix("docs/") if path.startswith("docs/") else None
