"""A plan of known numbers as text."""

from bootgrad.plan_tables import LayerPlan, OtherPlan, Plan, StepPlan
from bootgrad.planning import LinearLayer

LAYER = LinearLayer(8, 16, 300, 40)
CONV_LIKE = {"direct": 1.04, "gram": 156.42}


def make(backend=None, measured=None):
    layers = (
        LayerPlan("a", LAYER, "statistics", "direct", CONV_LIKE, 192_000, 3 * 2**20, 48_000, 0.215, backend, measured),
        LayerPlan("a", LAYER, "grad", "gram", {"gram": 0.5, "direct": 3.0}, 1.5e9, 0, 0.0, 8e-5, backend, measured),
    )
    others = (OtherPlan("layer_norm", "n.weight, n.bias", 1000), OtherPlan("layer_norm", "m.weight", 1048))
    steps = (StepPlan("plain", 3.0, 1.0, 1.0, measured and 1.0), StepPlan("reg1 ema", 9.0, 3.0, 2.25, measured))
    return Plan(8, 12_000, 10**6, layers, others, steps, "cpu", "float32", ("a remark",))


def test_rows_and_columns():
    first, second, steps, remarks = str(make()).split("\n\n")
    assert first.splitlines() == [
        "norms with the weight gradient, as rec.backward takes them",
        "layer  shape                  path    units      instead  multiply-adds  bytes  workspace  share",
        "a      linear 300→40, T = 16  direct   1.04  gram 156.42          192 k  3 MiB   46.9 KiB   0.21",
    ]
    assert second.splitlines()[2].split() == [
        *(
            "a",
            "linear",
            "300→40,",
            "T",
            "=",
            "16",
            "gram",
            "0.50",
            "direct",
            "3.00",
            "1.5",
            "G",
            "0",
            "B",
            "0",
            "B",
            "8e-05",
        )
    ]
    assert steps.splitlines() == [
        "steps, as ratios to the plain one",
        "step      units  time  memory",
        "plain      3.00  1.00    1.00",
        "reg1 ema   9.00  3.00    2.25",
    ]
    assert remarks.splitlines()[2:] == ["not predicted: layer_norm, 2 times, rows of 2 KiB together", "a remark"]


def test_columns_that_are_there_on_request():
    first, _, steps, _ = str(make("triton", 2.5)).split("\n\n")
    assert first.splitlines()[1].split()[2:5] == ["path", "backend", "units"]
    assert first.splitlines()[2].split()[6:8] == ["direct", "triton"] and first.splitlines()[2].endswith(
        "  0.21      2.50"
    )
    assert steps.splitlines()[1].split() == ["step", "units", "time", "measured", "memory"]
    assert steps.splitlines()[3].split() == ["reg1", "ema", "9.00", "3.00", "2.50", "2.25"]
