"""Observations in trackers, read back by their own packages, without a network."""

import json
import math
import time

import pytest

from bootgrad.errors import ArgumentError, DataError
from bootgrad.monitoring import MLflowWriter, TensorBoardWriter, WandbWriter, trackers

from .runs import observation

FINITE = {name: value for name, value in observation().scalars().items() if math.isfinite(value)}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    writer = TensorBoardWriter(tmp_path)
    writer.close()
    assert not list(tmp_path.iterdir())  # as on ranks that write nothing
    writer.write(observation(0))
    writer.write(observation(50, 1.5, flags=()))
    events = EventAccumulator(str(tmp_path), size_guidance={"histograms": 0})  # all of them
    events.Reload()  # before the end: all is there at once
    assert set(events.Tags()["scalars"]) == set(FINITE)
    traces = [(event.step, event.value) for event in events.Scalars("bootgrad/covariance_trace")]
    assert traces == [(0, 2.5), (50, 1.5)]
    (first, second) = events.Histograms("bootgrad/norms")
    assert (first.step, second.step) == (0, 50) and first.histogram_value.num == 4
    assert first.histogram_value.min == 0.5 and first.histogram_value.sum == 11.5
    (text,) = events.Tensors("bootgrad/flags/text_summary")
    assert text.tensor_proto.string_val[0].decode() == "covariance_trace of layer conv is 2.5, usually 0.1"
    writer.close()
    writer.write(observation(100))
    writer.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [event.step for event in events.Scalars("bootgrad/loss")] == [0, 50, 100]


def records_of(data):
    """The records of a log as of LevelDB: pieces of blocks, each behind its checksum, its length and whether more come."""
    begin, parts = 7, []  # behind the file's own header
    while begin + 7 <= len(data):
        if 32768 - begin % 32768 < 7:
            begin += 32768 - begin % 32768
            continue
        length, kind = int.from_bytes(data[begin + 4 : begin + 6], "little"), data[begin + 6]
        parts.append(data[begin + 7 : begin + 7 + length])
        begin += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield b"".join(parts)
            parts = []


@pytest.fixture
def offline(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for name in ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    return tmp_path


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_wandb(offline):
    import wandb
    from wandb.proto import wandb_internal_pb2

    writer = WandbWriter(project="digits", dir=str(offline))
    writer.close()
    assert wandb.run is None and writer.run is None and not list(offline.rglob("*.wandb"))
    writer.write(observation(0))
    writer.write(observation(50, 1.5))
    writer.close()
    assert wandb.run is None and writer.run is None
    (path,) = offline.rglob("*.wandb")
    end = time.monotonic() + 30
    while path.stat().st_size < 1000 and time.monotonic() < end:  # wandb's own process may write it a little later
        time.sleep(0.05)
    rows = []
    for data in records_of(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append({"/".join(item.nested_key) or item.key: item.value_json for item in items})
    assert [int(row["bootgrad/step"]) for row in rows] == [0, 50]
    for name, value in FINITE.items():
        assert float(rows[0][name]) == value
    assert "bootgrad/layer/head.out/noise_scale" not in rows[0]
    assert rows[0]["bootgrad/norms/_type"] == '"histogram"' and sum(json.loads(rows[0]["bootgrad/norms/values"])) == 4

    with wandb.init(project="digits", dir=str(offline)) as run:  # somebody else's run stays open, with steps of its own
        writer = WandbWriter(run)
        run.log({"other": 1})
        writer.write(observation(50))
        writer.close()
        run.log({"other": 2})
        assert run.summary["bootgrad/step"] == 50 and run.summary["other"] == 2
        with pytest.raises(ArgumentError, match="got project: leave them out"):
            WandbWriter(run, project="letters")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_mlflow(tmp_path, monkeypatch):
    import mlflow

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # of which mlflow-skinny has no other local store

    place = (tmp_path / "runs").as_uri()
    writer = MLflowWriter(tracking_uri=place, experiment="digits", run_name="first")
    writer.close()
    client = mlflow.MlflowClient(place)
    assert writer.run_id is None and client.get_experiment_by_name("digits") is None
    writer.write(observation(0))
    writer.write(observation(50, 1.5))
    run = client.get_run(writer.run_id)
    assert run.info.status == "RUNNING" and run.info.run_name == "first"
    assert run.data.metrics == FINITE | {"bootgrad/covariance_trace": 1.5}
    history = client.get_metric_history(writer.run_id, "bootgrad/covariance_trace")
    assert [(metric.step, metric.value) for metric in history] == [(0, 2.5), (50, 1.5)]
    writer.close()
    assert client.get_run(writer.run_id).info.status == "FINISHED"

    other = client.create_run(client.get_experiment_by_name("digits").experiment_id)
    own = MLflowWriter(other.info.run_id, tracking_uri=place)
    own.write(observation(0, layers={"(root)": observation().layers["conv"]}))
    own.close()
    run = client.get_run(other.info.run_id)
    assert run.info.status == "RUNNING" and run.data.metrics["bootgrad/layer/_root_/covariance_trace"] == 1.5
    with pytest.raises(ArgumentError, match="leave experiment and run_name out"):
        MLflowWriter(other.info.run_id, run_name="second", tracking_uri=place)


@pytest.mark.parametrize(
    ("writer", "module", "package"),
    [
        (lambda: TensorBoardWriter("."), "torch.utils.tensorboard", "tensorboard"),
        (WandbWriter, "wandb", "wandb"),
        (MLflowWriter, "mlflow", "mlflow-skinny"),
    ],
)
def test_a_package_that_is_not_there_is_named(writer, module, package, monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(trackers, "import_module", missing)
    with pytest.raises(ArgumentError, match=f"this writer needs {package} .*{module}.*: pip install {package}"):
        writer()


def test_a_file_is_no_folder_of_events(tmp_path):
    path = tmp_path / "file"
    path.write_text("")
    with pytest.raises(DataError, match="file cannot be written .*: choose another folder"):
        TensorBoardWriter(path).write(observation(0))
