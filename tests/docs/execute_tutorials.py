"""Runs the tutorials and keeps what they print: `python -m tests.docs.execute_tutorials` writes docs/tutorials/*.ipynb.

What is stored is sources, outputs in the order of execution, and the kernel's name; no times, paths or versions.
"""

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

TUTORIALS = Path(__file__).parents[2] / "docs/tutorials"
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def executed(path: Path) -> nbformat.NotebookNode:
    """The notebook, run from top to bottom in a kernel of its own; a cell that raises is an error."""
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=600, kernel_name="python3", record_timing=False).execute()
    return cleaned(notebook)


def cleaned(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Without what differs from one machine and one run to another, though nothing has changed."""
    notebook.metadata = nbformat.from_dict(METADATA)
    for cell in notebook.cells:
        cell.metadata = {}
        for output in cell.get("outputs", []):
            if "metadata" in output:
                output.metadata = {}
    return notebook


def main(paths: list[Path]) -> None:
    """Execute and write each."""
    for path in paths:
        nbformat.write(executed(path), path)
        print(path.relative_to(TUTORIALS.parents[1]))


if __name__ == "__main__":
    main([Path(name).resolve() for name in sys.argv[1:]] or sorted(TUTORIALS.glob("*.ipynb")))
