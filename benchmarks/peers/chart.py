"""The picture: a panel for each network and quantity, a bar for each library, this one's in colour."""

from pathlib import Path

from .page import HEADERS
from .rows import Row, is_provisional
from .ways import QUANTITIES

OURS, OTHERS, TEXT = "#0072B2", "#B0B0B0", "#333333"  # told apart by lightness, too
NAMES = {"mlp": "MLP", "reference": "Reference CNN", "vgg": "VGG-like", "resnet18-gn": "ResNet-18-GN"}


def draw(rows: list[Row], path: Path) -> None:
    """Bars of time ratios, labelled with time and memory; where there is none, what the library did instead."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    networks = list(dict.fromkeys(row["network"] for row in rows))
    by_quantity = {q: [row for row in rows if row["quantity"] == q] for q in QUANTITIES}
    peers = {q: list(dict.fromkeys(row["peer"] for row in own)) for q, own in by_quantity.items()}
    figure = Figure(figsize=(max(9, 3.1 * len(networks) + 1), 9), dpi=90, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(
        len(QUANTITIES), len(networks), squeeze=False, height_ratios=[max(2, len(peers[q])) for q in QUANTITIES]
    )
    for ax, network in zip(axes[0], networks, strict=True):
        ax.set_title(NAMES.get(network, network), fontsize="medium")
    for line, quantity in zip(axes, QUANTITIES, strict=True):
        for ax, network in zip(line, networks, strict=True):
            found = {row["peer"]: row for row in by_quantity[quantity] if row["network"] == network}
            _panel(ax, peers[quantity], found)
            if ax is line[0]:
                ax.set_ylabel(HEADERS[quantity], fontsize="large")
            else:
                ax.set_yticklabels([])
    title = "Time of a training step, as a ratio to the plain step (dashed); in brackets peak memory, likewise"
    figure.suptitle(title + "\nPROVISIONAL: fewer than nine rounds" * is_provisional(rows))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")


def _panel(ax, peers: list[str], found: dict[str, Row]) -> None:
    ratios = {peer: float(row["ratio"]) for peer, row in found.items() if row["ratio"]}
    longest = max(ratios.values(), default=1.0)
    ax.barh(
        range(len(peers)),
        [ratios.get(peer, 0) for peer in peers],
        color=[OURS if peer == "bootgrad" else OTHERS for peer in peers],
    )
    ax.axvline(1, color=TEXT, linewidth=0.8, linestyle="--")
    for k, peer in enumerate(peers):
        row = found.get(peer)
        if peer in ratios:
            label = f"{ratios[peer]:.3g}× ({float(row['memory_ratio']):.3g}×)"
        else:
            label = row["status"] if row else "not measured"
        ax.text(max(1, ratios.get(peer, 1)) + 0.03 * longest, k, label, va="center", fontsize=8, color=TEXT)
    ax.set_yticks(range(len(peers)), peers, fontsize=9)
    ax.set_xlim(0, 1.65 * longest)
    ax.tick_params(axis="x", labelsize=8)
    ax.invert_yaxis()
    ax.spines[["top", "right"]].set_visible(False)
