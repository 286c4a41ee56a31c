"""One real miniature search, through Ray and mmdet: killed with SIGKILL in its middle, resumed,
finished, exported."""

import importlib.util
import json
import signal
import subprocess
import sys
import time

import pytest

from cse_autoloss.cache import digest
from cse_autoloss.export import found as found_by_rank
from cse_autoloss.export import ranking
from cse_autoloss.journal import Journal, found_label
from cse_autoloss.trial import ConfigError
from detectors.config_files import read_config

CSE_SEARCH = [sys.executable, "-m", "cse_autoloss.cli"]
MINIATURE = """
detector: {trainer: "detectors.training:DetectorTrainer", config: faster_rcnn_proxy, data: embedded,
           steps: 20, tiny_steps: 10, warmup_steps: 20}
search: {branch: both, known: 1, population: 4, tournament: 2, offspring: 4000, candidates: 2,
         keep_rejected: true}
budget: {trials: 3}
tuning: {scales: [[1, 1]]}
stages:
  tiny: {task: tiny, batch: 2, keep: 1}
  full: {}
  confirm: {best: 2, seeds: 1}
  final: {best: 1, seeds: 1}
cluster: {workers: 2, num_cpus: 0.5, time_limit: 120}
"""


def cse_search(*arguments, **options):
    return subprocess.run(
        [*CSE_SEARCH, *map(str, arguments)], capture_output=True, text=True, timeout=600, **options
    )


def wait_until(condition, process, seconds=300):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f"the driver ended early:\n{process.stdout.read()}"
        assert time.monotonic() < end, "the run did not get there in time"
        time.sleep(0.3)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that was killed after its first candidate's training and resumed; and what was finished
    when it was killed."""
    folder = tmp_path_factory.mktemp("search") / "run"
    config = folder.with_name("miniature.yaml")
    config.write_text(MINIATURE)
    driver = subprocess.Popen(
        [*CSE_SEARCH, "run", str(config), "--out", str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )

    def one_proxy_done():
        try:
            return Journal.read(folder).trials("full", finished=True)
        except ConfigError:
            return []

    wait_until(one_proxy_done, driver)
    refused = cse_search("resume", folder)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    at_kill = {row.trial.key: row for row in Journal.read(folder).trials(finished=True)}
    resumed = cse_search("resume", folder)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    return folder, at_kill, refused, resumed


def test_a_second_driver_is_refused(finished):
    _, _, refused, _ = finished
    assert refused.returncode == 2
    assert "is working on this run" in refused.stderr and len(refused.stderr.splitlines()) == 1


def test_killing_loses_no_finished_training_and_repeats_none(finished):
    folder, at_kill, _, resumed = finished
    after = {row.trial.key: row for row in Journal.read(folder).trials(finished=True)}
    assert at_kill and {key: after[key] for key in at_kill} == at_kill
    assert f"{len(at_kill)} trainings are done and stay done" in resumed.stdout


def test_every_stage_was_real(finished):
    folder, *_ = finished
    status = json.loads(cse_search("status", folder, "--json").stdout)
    assert status["phase"] == "finished"
    assert status["trials"] == [3, 3]
    for branch in ("cls", "reg"):
        counts = status["funnel"][branch]
        assert (
            counts["generated"] >= counts["unique"] > counts["verified"] >= counts["optimised"] > 0
        )
    journal = Journal.read(folder)
    for row in journal.trials(finished=True):
        assert row.result.failure or row.result.provenance["torch"], (
            "each mAP stands beside what it was measured with"
        )
    assert {"tune", "tiny", "full", "confirm", "final"} == {
        row.stage for row in journal.trials(finished=True)
    }
    reasons = dict(journal.rejected("reg"))
    assert len(reasons) == status["funnel"]["reg"]["unique"] - status["funnel"]["reg"]["optimised"]
    assert len({reason.split(":")[0] for reason in reasons.values()}) > 2


def test_the_report_shows_what_default_and_winner_detect_in_the_same_images(finished):
    folder, *_ = finished
    kept = Journal.read(folder)["detections"]
    winner = found_label(ranking(Journal.read(folder))[0])
    assert kept["labels"] == ["default", winner] and 0 < len(kept["shown"]) <= 6
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert text.count("data:image/jpeg;base64,") == len(kept["shown"]) and len(text) < 1_500_000


def test_the_comparison_is_on_seeds_that_nothing_was_chosen_by(finished):
    journal = Journal.read(finished[0])
    used = {
        row.trial.seed
        for kind in ("tune", "tiny", "full", "confirm")
        for row in journal.trials(kind)
    }
    final = journal.trials("final")
    assert used.isdisjoint(row.trial.seed for row in final)
    assert {"default", "CSE-Autoloss-A"} < {row.label for row in final}
    assert all(
        {"val/mAP", "test/mAP"} <= set(row.result.metrics)
        for row in final
        if not row.result.failure
    )


def test_the_fittest_are_confirmed_on_seeds_of_their_own_and_ranked_by_that(finished):
    journal = Journal.read(finished[0])
    searched = {row.trial.seed for kind in ("tune", "tiny", "full") for row in journal.trials(kind)}
    confirming = journal.trials("confirm")
    assert confirming and searched.isdisjoint(row.trial.seed for row in confirming)
    found = journal.best(["confirm"])
    means = [candidate.closing for candidate in found[:2]]
    assert {row.candidate for row in confirming} == {candidate.id for candidate in found[:2]}
    assert means == sorted(means, reverse=True)
    assert {row.label for row in journal.trials("final")} >= {found_label(found[0])}


def test_the_report_and_the_exported_files_stand_on_their_own(finished):
    folder, *_ = finished
    page = (folder / "report.md").read_text()
    assert "CSE-Autoloss-A" in page and "test, over default" in page and "## Provenance" in page
    assert (folder / "progress.png").stat().st_size > 10_000
    best = found_by_rank(Journal.read(folder)).losses
    for branch in best:
        path = folder / f"best_{branch}.py"
        imports = [
            line.split()[1]
            for line in path.read_text().splitlines()
            if line.startswith(("import ", "from "))
        ]
        assert set(imports) <= {"math", "torch"}
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    config = read_config(str(folder / "best.py"))
    head = config.model.roi_head.bbox_head
    assert config.load_from == str(folder / "prepared")
    assert {"cls": head.loss_cls.type, "reg": head.loss_bbox.type}.items() >= dict.fromkeys(
        best, "SearchedLoss"
    ).items()


def test_every_training_starts_from_the_weights_that_the_run_keeps(finished):
    journal = Journal.read(finished[0])
    used = {
        row.result.provenance["weights_digest"]
        for row in journal.trials(finished=True)
        if not row.result.failure
    }
    assert used == {digest(journal.prepared)}


def test_a_finished_run_goes_on_with_a_larger_budget(finished):
    folder, *_ = finished
    refused = cse_search("resume", folder, "--set", "search.population=9")
    assert (
        refused.returncode == 2
        and "what may change is in budget, stages, others, cluster" in refused.stderr
    )
    before = {row.trial.key: row for row in Journal.read(folder).trials()}
    done = cse_search(
        "resume", folder, "--set", "budget.trials=4", "--set", "stages.confirm.best=0"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    journal = Journal.read(folder)
    after = {row.trial.key: row for row in journal.trials(finished=True)}
    assert {key: after[key] for key in before} == before
    new = [row for key, row in after.items() if key not in before]
    assert [row.stage for row in new].count("full") == 1 and {row.stage for row in new} <= {
        "tiny",
        "full",
        "final",
    }
    assert json.loads(cse_search("status", folder, "--json").stdout)["phase"] == "finished"

    more = cse_search(
        "resume", folder, "--set", "stages.final.seeds=2", "--set", "others.IoU loss.reg=IoU"
    )
    assert more.returncode == 0 and "IoU loss" in more.stdout, more.stdout + more.stderr
    rows = [row for row in Journal.read(folder).trials(finished=True) if row.trial.key not in after]
    assert {row.stage for row in rows} == {"final"}, "more seeds need no more searching"
    besides = [row.trial for row in rows if row.label == "IoU loss"]
    assert [dict(trial.losses) for trial in besides] == 2 * [{"reg": "Neg(Log(Div(I,U)))"}]
    assert len(rows) - len(besides) == len({row.label for row in rows}) - 1 >= 3
    refused = cse_search("resume", folder, "--set", "others.IoU loss.reg=GIoU")
    assert (
        refused.returncode == 2
        and "others.IoU loss: this run has compared other losses" in refused.stderr
    )


def test_without_trainings_allowed_known_losses_are_compared(tmp_path):
    config, folder = tmp_path / "miniature.yaml", tmp_path / "run"
    config.write_text(MINIATURE)
    done = cse_search(
        "run",
        config,
        "--set",
        "budget.trials=0",
        "--set",
        "others.IoU.reg=IoU",
        "--out",
        folder,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    journal = Journal.read(folder)
    assert {row.stage for row in journal.trials(finished=True)} == {"tune", "final"}
    assert {row.label for row in journal.trials("final")} == {"default", "CSE-Autoloss-A", "IoU"}
    assert "IoU" in done.stdout and "## The funnel" not in (folder / "report.md").read_text()
    refused = cse_search("export", folder, "-o", tmp_path / "best.py")
    assert refused.returncode == 2 and len(refused.stderr.strip().splitlines()) == 1


def test_a_wrong_setting_stops_before_anything_starts(tmp_path):
    for setting, message in (
        ("detector.stpes=5", "detector.stpes: unknown key; did you mean 'steps'?"),
        ("detector.data=coco:/nowhere", "/nowhere"),
        ("search.spaces.cls=one_stage_cls", "search.spaces.cls"),
        ("search.spaces.reg=region", "region"),
        (
            "others.mine.reg=GIuO",
            "others.mine.reg: no loss 'GIuO' in space reg; did you mean",
        ),
        ("others.default.reg=IoU", "others.default: names that start with default"),
    ):
        done = cse_search(
            "run", "--preset", "quickstart", "--set", setting, "--out", tmp_path / "run"
        )
        assert done.returncode == 2 and message in done.stderr, done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
        assert not (tmp_path / "run").exists()
