"""The tables for people, in Markdown, made of the rows."""

from .rows import Row, is_provisional
from .ways import PEERS, QUANTITIES

HEADERS = {"norms": "norms", "variance": "Γ", "reg1": "Reg1", "reg2": "Reg2"}
TITLES = {
    "mlp": "MLP, 784 – 1024 – 1024 – 10",
    "reference": "Reference CNN, 28×28",
    "vgg": "VGG-like, six 3×3 convolutions, 32×32",
    "resnet18-gn": "ResNet-18 with group norm, 32×32",
}


def render(timings: list[Row], judgements: list[Row], picture: str) -> str:
    """The whole page.

    Args:
        timings: rows of networks.
        judgements: rows of layer cases.
        picture: where the chart lies, as the page links to it.
    """
    lines = [
        "# Peers",
        "",
        "Made by `make bench-peers`, which measures again; do not edit. A step is forward, backward and the quantity, and",
        "leaves the gradient in `.grad`. Norms are ‖g_i‖², Γ is the trace of their covariance, Reg1 = Γ and Reg2 = ‖ḡ − c‖²,",
        "both with the exact gradient of loss + λ · penalty. `hand` is a double backward of the batch's gradient, `vmap` is",
        "`torch.func`'s. A way that gives norms and Γ at once has one time for both. Quantities and `.grad` were compared with",
        "plain autograd in float64, one backward pass per sample, before anything was timed. No transformer is among the",
        "networks yet.",
        "",
        f"![Time of each library's step, as a ratio to the plain step's]({picture})",
        "",
        "## Time and peak memory",
        "",
        "Time, and in brackets peak memory, as ratios to the plain step: steps take turns in one process, medians of the",
        "rounds; memory is the rise of VmHWM in a process of its own. – means that the library does not offer it.",
    ]
    for network in dict.fromkeys(row["network"] for row in timings):
        lines += ["", *network_table([row for row in timings if row["network"] == network])]
    lines += ["", "## Right, refused or wrong", "", *_judgement_table(judgements)]
    return "\n".join(lines) + "\n"


def network_table(rows: list[Row]) -> list[str]:
    """One network's peers × quantities, and why some cells have no figures."""
    first = rows[0]
    found = {(row["peer"], row["quantity"]): row for row in rows}
    counts = sorted({int(row["rounds"]) for row in rows if row["rounds"]})
    rounds = " to ".join(dict.fromkeys(map(str, counts[:1] + counts[-1:])))
    lines = [
        f"### {TITLES.get(first['network'], first['network'])}",
        "",
        f"Data: {first['data']}; batch {first['batch']}, {first['threads']} threads of {first['device']}, "
        f"torch {first['torch']}, {first['backend']}; {first['date']}, rounds: {rounds}.",
        "",
    ]
    if is_provisional(rows):
        lines += ["Provisional: fewer than nine rounds. Memory may be compared, times hardly.", ""]
    body, notes = [], []
    for peer in PEERS:
        cells = []
        for quantity in QUANTITIES:
            row = found.get((peer, quantity))
            cells.append(cell(row))
            if row and row["why"]:
                notes.append(f"{peer}, {HEADERS[quantity]}: {row['why']}")
        body.append([_label(peer, rows), *cells])
    lines += table(["", *(HEADERS[q] for q in QUANTITIES)], body)
    return lines + _list(notes)


def cell(row: Row | None) -> str:
    """A row as a table's cell."""
    if row is None:
        return "–"
    if row["status"] == "wrong":
        return f"**wrong** ({row['error']})"
    if not row["ratio"]:
        return "refuses" if row["status"] == "refuses" else "not measured"
    return f"{row['ratio']} ({row['memory_ratio']})"


def table(header: list[str], body: list[list[str]]) -> list[str]:
    """Lines of a Markdown table."""
    lines = [header, ["---"] * len(header), *body]
    return ["| " + " | ".join(text.replace("|", "\\|") for text in line) + " |" for line in lines]


def _judgement_table(rows: list[Row]) -> list[str]:
    """Cases × peers."""
    cases = list(dict.fromkeys(row["case"] for row in rows))
    body, notes = [], []
    for case in cases:
        cells = []
        for peer in PEERS:
            own = [row for row in rows if (row["case"], row["peer"]) == (case, peer)]
            cells.append(_verdict(own))
            notes += [f"{case}: {peer} {why}" for why in dict.fromkeys(row["why"] for row in own if row["why"])]
        body.append([case, *cells])
    lines = [
        "Small models in float64, each with one way of using a layer; all quantities that a library offers. A number is the",
        "relative error of what is wrong, of the value or of `.grad`.",
        "",
        *table(["", *(_label(peer, rows) for peer in PEERS)], body),
    ]
    return lines + _list(notes)


def _verdict(rows: list[Row]) -> str:
    """What is true of all quantities in one word, and what is not by quantity."""
    if len({row["status"] for row in rows}) == 1 and rows[0]["status"] != "wrong":
        return rows[0]["status"]
    words = {"wrong": "**wrong**", "right": "right", "refuses": "refuses"}
    parts = []
    for status, word in words.items():
        own = [row for row in rows if row["status"] == status]
        if own:
            names = [
                f"{HEADERS[r['quantity']]} {r['error']}" if status == "wrong" else HEADERS[r["quantity"]] for r in own
            ]
            parts.append(f"{word}: {', '.join(names)}")
    return "; ".join(parts) or "–"


def _label(peer: str, rows: list[Row]) -> str:
    """The peer with its version, where it is not this torch's."""
    versions = {row["version"] for row in rows if row["peer"] == peer} - {rows[0]["torch"], ""}
    return " ".join([peer, *sorted(versions)])


def _list(notes: list[str]) -> list[str]:
    return ["", *(f"- {note}" for note in dict.fromkeys(notes))] if notes else []
