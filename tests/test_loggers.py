"""A run, told to other programs: whatever they do, the journal stays the truth."""

import warnings

import pytest
from test_search_decisions import CONFIG, SPACES, detector

from cse_autoloss.breeder import InlineBreeder
from cse_autoloss.config import parse_config
from cse_autoloss.errors import UserError
from cse_autoloss.journal import Journal
from cse_autoloss.loggers import load_logger, logging
from cse_autoloss.search import Search
from cse_autoloss.simulated import SimulatedCluster
from cse_autoloss.trial import ConfigError


class Recorder:
    told: list = []

    def __init__(self, folder, config):
        self.told.clear()
        assert config["budget"]["trials"] == 3

    def training(self, number, row, best):
        self.told.append((number, row.trial.key, row.stage, best))

    def close(self):
        self.told.append("closed")


class Broken(Recorder):
    def training(self, number, row, best):
        raise RuntimeError("no such server")


def run(folder, *names, journal=None, **options):
    config = parse_config({**CONFIG, "budget": {"trials": 3}, "log": list(names)})
    data = config.model_dump(mode="json")
    journal = journal or Journal.create(folder, {"config": data, "spaces": SPACES})
    with logging(journal, config.log, data) as tell:
        cluster = SimulatedCluster(detector(**options), 2)
        breeder = InlineBreeder.of(config, SPACES, journal)
        Search(config, SPACES, journal, cluster, breeder, tell).run()
    return journal


def test_each_training_is_told_once_with_the_best_so_far(tmp_path):
    journal = run(tmp_path / "run", f"{__name__}:Recorder")
    *told, last = Recorder.told
    rows = journal.trials(finished=True)
    assert last == "closed" and [number for number, *_ in told] == list(range(1, len(rows) + 1))
    assert {key for _, key, *_ in told} == {row.trial.key for row in rows}
    bests = [best for _, _, stage, best in told if stage == "full"]
    assert bests == sorted(bests) and max(bests) == max(c.fitness for c in journal.trained())


def test_a_resumed_run_tells_what_is_new(tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        run(folder, f"{__name__}:Recorder", stop=8)
    first = {key for _, key, *_ in Recorder.told[:-1]}
    so_far = {stage: best for _, _, stage, best in Recorder.told[:-1]}
    journal = run(None, f"{__name__}:Recorder", journal=Journal.resume(folder))
    second = {key for _, key, *_ in Recorder.told[:-1]}
    assert all(best >= so_far.get(stage, 0) for _, _, stage, best in Recorder.told[:-1])
    assert first.isdisjoint(second)
    assert len(first | second) == len(journal.trials(finished=True))


def test_a_logger_that_fails_stops_nothing(tmp_path):
    with pytest.warns(UserWarning, match="Broken failed and is left out: no such server"):
        journal = run(tmp_path / "run", f"{__name__}:Broken")
    assert journal["compared"]


def test_tensorboard_reads_what_was_told(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        journal = run(tmp_path / "run", "tensorboard")
    events = EventAccumulator(str(journal.folder / "tensorboard"))
    events.Reload()
    measured = [event.value for event in events.Scalars("full/val/mAP")]
    fitness = [row.result.mAP for row in journal.ended_since(0) if row.stage == "full"]
    assert measured == pytest.approx(fitness)


def test_mlflow_holds_what_was_told(tmp_path, monkeypatch):
    pytest.importorskip("mlflow", reason="mlflow is not installed")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.chdir(tmp_path)
    from mlflow import MlflowClient

    journal = run(tmp_path / "run", "mlflow")
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (experiment,) = (e for e in client.search_experiments() if e.name == "cse_autoloss")
    (told,) = client.search_runs([experiment.experiment_id])
    history = client.get_metric_history(told.info.run_id, "full/best")
    assert told.info.status == "FINISHED" and told.data.params["budget.trials"] == "3"
    assert history[-1].value == max(candidate.fitness for candidate in journal.trained())


def test_what_cannot_be_loaded_is_refused_before_a_run():
    with pytest.raises(ConfigError, match="log: 'wandb' is neither tensorboard nor mlflow nor"):
        load_logger("wandb")
    with pytest.raises(UserError, match="log: cannot import 'nowhere'"):
        load_logger("nowhere:Logger")
