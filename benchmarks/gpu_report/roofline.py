"""The roofline: every timed op by its operations per byte and the rate that it reached, below the measured ceilings."""

from .rows import Store

COLORS = {"cuda": "tab:green", "triton": "tab:blue", "eager": "tab:gray", "compiled": "tab:green"}


def draw(store: Store, limits: dict[str, float]) -> None:
    """``<stem>.png`` beside the other files; nothing without matplotlib or without a timed op."""
    rows = [row for row in store.rows if row["section"] == "ops" and row["status"] == "ok" and row["operations"]]
    if not rows:
        return
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        print("no matplotlib here: no roofline")
        return
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    intensities = []
    for backend, color in COLORS.items():
        own = [row for row in rows if row["backend"] == backend]
        points = [
            (float(r["operations"]) / float(r["bytes"]), float(r["operations"]) / float(r["microseconds"])) for r in own
        ]
        if points:
            axes.scatter(*zip(*((i, rate / 1e6) for i, rate in points), strict=True), s=12, color=color, label=backend)
            intensities += [i for i, _ in points]
    bandwidth = limits.get("copy")
    rates = {name: rate for name, rate in limits.items() if name != "copy" and bandwidth}
    ridges = [rate / bandwidth for rate in rates.values()]
    low, high = min(intensities + ridges) / 2, 2 * max(intensities + ridges)
    for (name, rate), ridge in zip(rates.items(), ridges, strict=True):
        axes.plot([low, ridge, high], [low * bandwidth / 1e12, rate / 1e12, rate / 1e12], lw=1, label=name)
    axes.set(xscale="log", yscale="log", xlabel="operations per byte", ylabel="Tflop/s", title=store.stem)
    axes.legend(fontsize=8)
    for folder in store.folders:
        figure.savefig(folder / f"{store.stem}.png", dpi=120)
    pyplot.close(figure)
