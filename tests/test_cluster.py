"""Trials on a real local Ray cluster: what a trial does wrong becomes a failed result, and the
others go on."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import ray
from misbehaving import MisbehavingTrainer as M

from cse_autoloss import cluster as cluster_module
from cse_autoloss import ray_session, worker_pool
from cse_autoloss.cluster import Cluster, ClusterError
from cse_autoloss.config import ClusterSection, parse_config
from cse_autoloss.run import Stopped, check, stopping
from cse_autoloss.trial import Trial

PLAIN = {"trainer": "misbehaving:MisbehavingTrainer"}


def results_of(cluster, trials, limit=90.0):
    queue, results, end = list(trials), {}, time.monotonic() + limit
    while len(results) < len(trials) and time.monotonic() < end:
        while queue and cluster.free > 0:
            cluster.submit(queue.pop(0))
        results |= {result.key: result for result in cluster.wait()}
    return results


def train_one(cluster, key="good", seed=0):
    return results_of(cluster, [Trial(key, seed=seed)])[key]


def test_a_worker_sees_the_gpus_that_it_was_given_and_no_others(tmp_path, monkeypatch):
    options = {"trainer": "misbehaving:MisbehavingTrainer", "folder": str(tmp_path)}
    monkeypatch.setenv("RAY_worker_niceness", "0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")  # two by name, as a user's node has them
    ray.init(address="local", num_cpus=4, num_gpus=2, include_dashboard=False, log_to_driver=False)
    try:
        with monkeypatch.context() as patched:
            patched.setattr(cluster_module, "open_ray", lambda section: False)
            patched.setattr(ray, "shutdown", lambda: None)
            seen = {}
            for share in (0, 0.5, 1):
                with Cluster(ClusterSection(workers=1, num_gpus=share), options) as cluster:
                    cluster.prepare()
                    seen[share] = train_one(cluster).provenance["gpus"]
    finally:
        ray.shutdown()
    assert seen[0] == "" and seen[0.5] in ("0", "1") and seen[1] in ("0", "1")


@pytest.fixture(scope="module")
def ray_here():
    """One local Ray for the tests that do not look at how it starts."""
    monkeypatch = pytest.MonkeyPatch()
    with monkeypatch.context() as patched:
        patched.setattr(os, "cpu_count", lambda: 4)  # whatever this machine has
        ray_session.open_ray(ClusterSection())
    yield
    ray.shutdown()


@pytest.fixture
def make(ray_here, tmp_path, monkeypatch):
    """Clusters of misbehaving trainers on it."""
    monkeypatch.setattr(cluster_module, "open_ray", lambda section: False)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(cluster_module, "GRACE", 0.5)

    def make(trainer="MisbehavingTrainer", workers=2, num_cpus=0.5, **settings):
        section = ClusterSection(workers=workers, num_cpus=num_cpus, **settings)
        return Cluster(section, {"trainer": f"misbehaving:{trainer}", "folder": str(tmp_path)})

    return make


def test_what_goes_wrong_in_one_trial_stays_in_that_trial(make, tmp_path):
    with make(retries=1) as cluster:
        cluster.prepare()
        results = results_of(
            cluster,
            [
                Trial("raises", seed=M.RAISES),
                Trial("good-1"),
                Trial("dies", seed=M.DIES),
                Trial("dies-once", seed=M.DIES_ONCE),
                Trial("crashes", seed=M.CRASHES),
                Trial("memory-once", seed=M.MEMORY_ONCE),
                Trial("hangs", seed=M.HANGS, time_limit=1.0),
                Trial("not-a-number", seed=M.NOT_A_NUMBER),
                Trial("text", seed=M.NO_TEXT),
                Trial("others", seed=M.OTHERS_RESULT),
                *(Trial(f"good-{i}") for i in range(2, 6)),
            ],
        )
    assert len(results) == 14
    assert results["raises"].failure == "RuntimeError: the loss is no loss"
    assert results["dies"].failure.startswith("the machine failed it 2 times: ActorDiedError")
    assert results["crashes"].failure.startswith("the machine failed it 2 times: ActorDiedError")
    assert results["hangs"].failure == "outlived its time limit of 1 s"
    assert results["dies-once"].mAP == results["memory-once"].mAP == 0.5
    assert "mAP nan, which is no finite number" in results["not-a-number"].failure
    assert "mAP '0.3', which is no finite number" in results["text"].failure
    assert "the result of another trial, 'good-1'" in results["others"].failure
    assert all(results[f"good-{i}"].mAP == 0.5 for i in range(1, 6))
    assert (tmp_path / "dies").read_text() == "xx", "once, and once again"
    assert (tmp_path / "raises").read_text() == "x", "a loss's own fault is not tried again"
    assert (tmp_path / "good-1").read_text() == "x"


def test_workers_live_on_from_trial_to_trial_until_their_gpu_fails(make):
    with make(workers=1) as cluster:
        cluster.prepare()
        before = {train_one(cluster, f"good-{i}").provenance["process"] for i in range(3)}
        broken = train_one(cluster, "broken", M.GPU_BREAKS_ONCE)
        after = train_one(cluster, "good-3").provenance["process"]
    assert len(before) == 1 and os.getpid() not in before
    assert broken.mAP == 0.5 and broken.provenance["process"] == after not in before


def test_a_worker_that_dies_idle_costs_no_trial_an_attempt(make):
    with make(workers=1, retries=0) as cluster:
        cluster.prepare()
        for i in range(3):
            os.kill(train_one(cluster, f"good-{i}").provenance["process"], signal.SIGKILL)
            time.sleep(0.5)
        assert train_one(cluster, "good-3").mAP == 0.5


def test_workers_that_cannot_start_end_the_run_with_their_reason(make):
    with make("BrokenTrainer", retries=0) as cluster:
        cluster.prepare()
        with pytest.raises(ClusterError, match="do not start: .*no annotations at /data/coco"):
            results_of(cluster, [Trial("good")], limit=60)


def test_a_worker_that_never_gets_done_with_starting_is_replaced(make):
    with make("SlowTrainer", start_limit=5) as cluster:
        cluster.prepare()
        results = results_of(cluster, [Trial(f"t{i}", seed=M.SLEEPS, lr_scale=9) for i in range(4)])
    assert len({result.provenance["process"] for result in results.values()}) == 2
    assert all(result.mAP == 0.5 for result in results.values())


def test_a_preparation_has_a_time_limit_and_survives_the_death_of_its_worker(make):
    with make("EndlessPreparation", prepare_limit=1) as cluster:
        with pytest.raises(ClusterError, match="longer than cluster.prepare_limit=1 s"):
            cluster.prepare()
    with make("DyingPreparation", workers=1, retries=1) as cluster:
        assert cluster.prepare() == b"weights"
        assert train_one(cluster).mAP == 0.5


def test_a_trial_goes_to_another_node_than_the_one_that_failed_it(make):
    with make(workers=2, retries=3) as cluster:
        cluster.prepare()
        assert train_one(cluster, "warm-up").mAP == 0.5
        while len(cluster._pool.idle) < 2:
            cluster.wait()
        sick, healthy = cluster._pool.idle
        sick.node, healthy.node = "sick", "healthy"
        cluster._waiting.append(cluster_module._Task(Trial("again"), 1, frozenset({"sick"})))
        cluster._dispatch()
        assert [running.worker for running in cluster.running] == [healthy]
        cluster.submit(Trial("other"))
        assert [running.worker for running in cluster.running] == [healthy, sick]


def test_a_worker_of_two_processes_is_replaced_as_a_whole(make, tmp_path):
    with make(workers=1, num_cpus=1.5, processes=2) as cluster:  # room for no other beside it
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


@pytest.mark.parametrize("name", ["head", "raylet"])
def test_a_driver_whose_ray_is_gone_ends_by_itself_with_the_reason(make, monkeypatch, name):
    monkeypatch.setattr(ray_session, "ASK_EVERY", 0.1)
    monkeypatch.setattr(ray_session, "GONE", {"head": 0.5, "raylet": 0.5})
    with make(workers=1) as cluster:
        cluster.prepare()
        results_of(cluster, [Trial(f"good-{i}") for i in range(6)])  # while it is there
        assert cluster._lifelines._places.keys() == {"head", "raylet"}
        cluster._lifelines._places[name] = "127.0.0.1", 1  # where nobody listens
        with pytest.raises(ClusterError, match=f"Ray's {name} at 127.0.0.1:1 has been gone for"):
            results_of(cluster, [Trial(f"more-{i}") for i in range(20)])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_gpus": 1}, "no worker fits: each needs 0.5 CPUs and 1 GPUs; the cluster has .*0 G"),
        ({"num_gpus": 1, "processes": 2}, "each needs 1 CPUs and 2 GPUs for 2 processes"),
        ({"workers": 9, "num_cpus": 1}, "9 workers of 1 CPUs and 0 GPUs do not fit; 4 would"),
    ],
)
def test_workers_that_do_not_fit_are_refused_at_once(make, settings, message):
    started = time.monotonic()
    with pytest.raises(ClusterError, match=message):
        make(**settings)
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    ("settings", "right"),
    [
        (
            {"workers": 2, "num_cpus": 900},
            "2 workers of 900 CPUs .* has 2; cluster.num_cpus=1 does",
        ),
        ({"num_cpus": 2.5}, "1 workers of 2.5 CPUs .* cluster.num_cpus=2 does"),
        ({"workers": 5}, "5 workers of 1 CPUs .* cluster.workers=2 or cluster.num_cpus=0.4 does"),
        ({"processes": 3}, "1 workers of 3 CPUs for 3 processes .* cluster.num_cpus=0.6666 does"),
    ],
)
def test_what_this_machine_can_never_hold_is_refused_before_ray_starts(
    monkeypatch, settings, right
):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("Ray was started"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ClusterError, match=right):
        check(parse_config({"detector": PLAIN, "cluster": settings}))
    with pytest.raises(ClusterError, match=right):
        Cluster(ClusterSection(**settings), PLAIN)
    ray_session.check_machine(ClusterSection(**settings, address="auto"))  # which may grow


def test_in_a_cluster_that_may_grow_workers_wait_for_room_and_say_so(make, monkeypatch, caplog):
    monkeypatch.setattr(cluster_module, "open_ray", lambda section: True)
    monkeypatch.setattr(worker_pool, "NOTICE", 0.5)
    for prepared in (None, b"weights"):
        caplog.clear()
        with make(num_cpus=900, start_limit=3) as cluster:
            with pytest.raises(
                ClusterError, match="no worker has found room .* each needs 900 CPU"
            ):
                cluster.prepare(prepared)
                results_of(cluster, [Trial("good")])
        assert [record.message[:22] for record in caplog.records] == ["waiting up to cluster."]


def test_shares_of_a_gpu_are_counted_by_gpu(make, monkeypatch):
    node = {"NodeID": "another", "Alive": True, "Resources": {"CPU": 3.0, "GPU": 4.0}}
    monkeypatch.setattr(worker_pool.ray, "nodes", lambda: [node, node, {**node, "Alive": False}])

    def fits(**settings):
        with make(workers=None, **settings) as cluster:
            return cluster.size

    assert fits(num_cpus=0.1, num_gpus=0.4) == 16, "two on each of eight GPUs, not ten on four"
    assert fits(num_cpus=2) == 2, "one a node: a process has its CPUs on one"
    assert fits(num_cpus=0.3) == 20, "0.3 goes ten times into 3"


def test_a_local_cluster_listens_on_this_machine_alone_and_its_workers_do_not_give_way(make):
    listening = set()
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            listening |= {
                connection.laddr.ip.removeprefix("::ffff:")
                for connection in process.net_connections(kind="inet")
                if connection.status == psutil.CONN_LISTEN
            }
    assert listening == {"127.0.0.1"}
    with make(workers=1) as cluster:
        cluster.prepare()
        assert train_one(cluster).provenance["nice"] == os.nice(0)


def test_the_reason_of_a_fault_is_the_line_that_says_what_happened():
    killed = ray.exceptions.OutOfMemoryError("Task was killed: low on memory.\n\nRefer to docs.")
    assert worker_pool.cause_of(killed) == "OutOfMemoryError: Task was killed: low on memory."
    died = ray.exceptions.RayActorError(error_msg="The actor died.\n\tpid: 1\nIts node has died.")
    assert worker_pool.cause_of(died) == "RayActorError: Its node has died."
    assert worker_pool.cause_of(TimeoutError()) == "TimeoutError: no message"


def test_an_address_where_nobody_listens_is_refused_at_once():
    with pytest.raises(ClusterError, match="cannot reach a Ray cluster at 127.0.0.1:1"):
        Cluster(
            ClusterSection(address="127.0.0.1:1"), {"trainer": "misbehaving:MisbehavingTrainer"}
        )


def test_a_cluster_that_asks_for_another_token_says_so_in_one_line(monkeypatch):
    def refuse(**_):
        try:
            raise ray.exceptions.AuthenticationError("InvalidAuthToken")
        except ray.exceptions.AuthenticationError as error:
            raise ConnectionError("Failed to connect to Ray cluster") from error

    monkeypatch.setattr(ray, "init", refuse)
    monkeypatch.setattr(ray_session, "_check_reachable", lambda address: None)
    with pytest.raises(ClusterError, match="asks for a token .* ~/.ray/auth_token") as caught:
        ray_session.open_ray(ClusterSection(address="head:6379"))
    assert "\n" not in str(caught.value)


def test_a_local_ray_that_does_not_start_is_one_line(monkeypatch):
    def time_out(**_):
        raise Exception("The current node timed out during startup.\nThis could happen because")

    monkeypatch.setattr(ray, "init", time_out)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ClusterError, match="Ray cannot be started on this machine") as caught:
        ray_session.open_ray(ClusterSection())
    assert "\n" not in str(caught.value) and signal.getsignal(signal.SIGTERM) is before


def test_a_signal_stops_a_run_while_ray_starts_too(monkeypatch):
    def told_to_end(**_):
        ray._private.utils.set_sigterm_handler(lambda number, _: sys.exit(number))  # as Ray does
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(ray, "init", told_to_end)
    with pytest.raises(Stopped), stopping():
        ray_session.open_ray(ClusterSection())


def test_a_ray_without_the_private_function_that_takes_sigterm_starts_too(monkeypatch):
    monkeypatch.delattr(ray._private.utils, "set_sigterm_handler")
    monkeypatch.setattr(ray, "init", lambda **_: None)
    ray_session.open_ray(ClusterSection())
    assert not hasattr(ray._private.utils, "set_sigterm_handler")


TWO_NODES = """
import sys
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
second = cluster.add_node(num_cpus=1)
processes = [info.process.pid for infos in second.all_processes.values() for info in infos]
print(cluster.address, *processes, flush=True)
sys.stdin.read()
cluster.shutdown()
"""


def test_trials_go_on_when_a_node_is_killed(tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", raising=False)
    with subprocess.Popen(
        [sys.executable, "-c", TWO_NODES],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as head:
        address, *processes = head.stdout.readline().split()
        driver = subprocess.run(
            [sys.executable, "-c", DRIVER, address, str(tmp_path), *processes],
            capture_output=True,
            text=True,
            timeout=180,
        )
        head.stdin.close()
    assert driver.returncode == 0, driver.stderr[-3000:]
    results = json.loads(driver.stdout.splitlines()[-1])
    assert len(results) >= 12 and results == {f"t{i}": 0.5 for i in range(len(results))}


DRIVER = """
import json, os, signal, sys, time
from misbehaving import MisbehavingTrainer as M
from cse_autoloss.cluster import Cluster
from cse_autoloss.config import ClusterSection
from cse_autoloss.trial import Trial

address, folder, *processes = sys.argv[1:]
section = ClusterSection(address=address, workers=2)
with Cluster(section, {"trainer": "misbehaving:MisbehavingTrainer", "folder": folder}) as cluster:
    cluster.prepare()
    results, submitted, last = {}, 0, None
    while last is None or len(results) < last:
        while cluster.free and submitted != last:
            cluster.submit(Trial(f"t{submitted}", seed=M.SLEEPS, lr_scale=0.5))
            submitted += 1
        if last is None and len(cluster.running) == 2 and len(results) >= 2:  # both work
            for process in processes:
                os.kill(int(process), signal.SIGKILL)
            last = submitted + 8
        results |= {result.key: result.mAP for result in cluster.wait()}
print(json.dumps(results))
"""
