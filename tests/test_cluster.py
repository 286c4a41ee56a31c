"""Trials on a real local Ray cluster: what a trial does wrong becomes a failed result, and the
others go on."""

import os
import time

import pytest
import ray
from misbehaving import MisbehavingTrainer as M

from cse_autoloss import cluster as cluster_module
from cse_autoloss.cluster import Cluster, ClusterError
from cse_autoloss.config import ClusterSection
from cse_autoloss.trial import Trial


def results_of(cluster, trials, limit=90.0):
    queue, results, end = list(trials), {}, time.monotonic() + limit
    while len(results) < len(trials) and time.monotonic() < end:
        while queue and cluster.free > 0:
            cluster.submit(queue.pop(0))
        results |= {result.key: result for result in cluster.wait()}
    return results


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    monkeypatch.setattr(cluster_module, "GRACE", 0.5)
    section = ClusterSection(workers=2, num_cpus=0.5, retries=2)
    with Cluster(
        section, {"trainer": "misbehaving:MisbehavingTrainer", "folder": str(tmp_path)}
    ) as cluster:
        cluster.prepare()
        yield cluster


def test_what_goes_wrong_in_one_trial_stays_in_that_trial(cluster, tmp_path):
    results = results_of(
        cluster,
        [
            Trial("raises", seed=M.RAISES),
            Trial("good-1"),
            Trial("dies", seed=M.DIES),
            Trial("dies-once", seed=M.DIES_ONCE),
            Trial("hangs", seed=M.HANGS, time_limit=1.0),
            *(Trial(f"good-{i}") for i in range(2, 6)),
        ],
    )
    assert len(results) == 9
    assert results["raises"].failure == "RuntimeError: the loss is no loss"
    assert results["dies"].failure.startswith("its worker died 3 times")
    assert results["hangs"].failure == "outlived its time limit of 1 s"
    assert results["dies-once"].mAP == 0.5
    assert all(results[f"good-{i}"].mAP == 0.5 for i in range(1, 6))
    assert (tmp_path / "dies").read_text() == "xxx", "once, and twice again"
    assert (tmp_path / "dies-once").read_text() == "xx"
    assert (tmp_path / "good-1").read_text() == "x"


def test_workers_live_on_from_trial_to_trial(cluster):
    results = results_of(cluster, [Trial(f"good-{i}") for i in range(6)])
    processes = {result.provenance["process"] for result in results.values()}
    assert 1 <= len(processes) <= 2 and os.getpid() not in processes


def test_a_worker_of_two_processes_is_replaced_as_a_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(cluster_module, "GRACE", 0.5)
    section = ClusterSection(
        workers=1, num_cpus=os.cpu_count() / 2, processes=2, retries=2
    )  # room for no other beside it
    with Cluster(
        section, {"trainer": "misbehaving:MisbehavingTrainer", "folder": str(tmp_path)}
    ) as cluster:
        cluster.prepare()
        results = results_of(
            cluster,
            [
                Trial("good-1"),
                Trial("one-dies", seed=M.SECOND_DIES_ONCE),
                Trial("hangs", seed=M.HANGS, time_limit=1.0),
                Trial("good-2"),
            ],
        )
    assert results.pop("hangs").failure == "outlived its time limit of 1 s"
    assert {key: result.mAP for key, result in results.items()} == {
        "good-1": 0.5,
        "one-dies": 0.5,
        "good-2": 0.5,
    }
    assert (tmp_path / "good-1").read_text() == "xx", "both processes have trained it"
    assert results["good-1"].provenance["process"] != results["good-2"].provenance["process"], (
        "the first process ended, too"
    )


def test_workers_of_several_processes_that_do_not_fit_are_refused(monkeypatch):
    monkeypatch.setenv(
        "CUDA_VISIBLE_DEVICES", ""
    )  # a cluster without a GPU, also where there is one
    section = ClusterSection(workers=1, processes=2, num_gpus=1)
    with pytest.raises(ClusterError, match="no worker fits: each needs 2 CPUs and 2 GPUs"):
        Cluster(section, {"trainer": "misbehaving:MisbehavingTrainer"})


def test_workers_that_cannot_start_end_the_run_with_their_reason(tmp_path):
    section = ClusterSection(workers=1, retries=0)
    with Cluster(
        section, {"trainer": "misbehaving:BrokenTrainer", "folder": str(tmp_path)}
    ) as cluster:
        cluster.prepare()
        with pytest.raises(ClusterError, match="no annotations at /data/coco"):
            results_of(cluster, [Trial("good")], limit=60)


def test_a_cluster_that_holds_no_worker_is_refused(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(
        ClusterError, match="no worker fits: each needs 1 CPUs and 1 GPUs; the cluster has .* and 0"
    ):
        Cluster(ClusterSection(num_gpus=1), {"trainer": "misbehaving:MisbehavingTrainer"})


def test_a_worker_sees_the_gpus_that_it_was_given_and_no_others(tmp_path, monkeypatch):
    options = {"trainer": "misbehaving:MisbehavingTrainer", "folder": str(tmp_path)}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    ray.init(address="local", num_cpus=4, num_gpus=2, include_dashboard=False, log_to_driver=False)
    try:
        seen = {}
        monkeypatch.setattr(
            cluster_module.ray, "init", lambda **_: None
        )  # two GPUs by name, as a user's node has them
        monkeypatch.setattr(cluster_module.ray, "shutdown", lambda: None)
        for share in (0, 0.5, 1):
            with Cluster(ClusterSection(workers=1, num_gpus=share), options) as cluster:
                cluster.prepare()
                seen[share] = results_of(cluster, [Trial("good")])["good"].provenance["gpus"]
    finally:
        monkeypatch.undo()
        ray.shutdown()
    assert seen[0] == "" and seen[0.5] in ("0", "1") and seen[1] in ("0", "1")


def test_an_address_where_nobody_listens_is_refused_at_once():
    with pytest.raises(ClusterError, match="cannot reach a Ray cluster at 127.0.0.1:1"):
        Cluster(
            ClusterSection(address="127.0.0.1:1"), {"trainer": "misbehaving:MisbehavingTrainer"}
        )
