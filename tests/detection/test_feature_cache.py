"""Arrays that one process of a node makes and all read."""

import errno
import multiprocessing
import os
import time

import pytest
import torch

from detectors import feature_cache

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "cse_autoloss" / "features"


def make(writer):
    writer.add("a", torch.arange(6).view(3, 2))
    writer.add("a", torch.arange(2).view(1, 2))
    writer.add("empty", torch.empty(0, 4))
    return {"made_by": os.getpid()}


def _ask(queue):
    def slowly(writer):
        time.sleep(0.3)
        return make(writer)

    queue.put(feature_cache.shared("name", slowly, CPU).info["made_by"])


def test_arrays_grow_by_rows_and_come_back_as_they_were():
    arrays = feature_cache.shared("name", make, CPU)
    assert arrays["a"].tolist() == [[0, 1], [2, 3], [4, 5], [0, 1]]
    assert arrays["empty"].shape == (0, 4) and arrays["a"].dtype == torch.int64


def test_the_first_process_that_asks_makes_them_and_the_others_wait(own_cache):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=_ask, args=(queue,)) for _ in range(3)]
    for process in processes:
        process.start()
    assert len({queue.get(timeout=30) for _ in processes}) == 1
    for process in processes:
        process.join()


def test_what_a_dead_process_left_is_made_anew(own_cache):
    (own_cache / "name.part").mkdir(parents=True)
    (own_cache / "name.part" / "a").write_bytes(b"half")
    assert len(feature_cache.shared("name", make, CPU)["a"]) == 4
    with pytest.raises(ZeroDivisionError):
        feature_cache.shared("other", lambda writer: 1 / 0, CPU)
    assert len(feature_cache.shared("other", make, CPU)["a"]) == 4


@pytest.mark.parametrize("name", ["a", "index.json"])
@pytest.mark.parametrize("cut", [os.unlink, lambda path: os.truncate(path, 3)], ids=["gone", "cut"])
def test_what_a_crash_of_the_machine_left_of_them_is_made_anew(own_cache, cut, name):
    feature_cache.shared("name", make, CPU)
    cut(own_cache / "name" / name)
    assert feature_cache.shared("name", make, CPU)["a"].sum() == 16


def test_what_was_not_finished_takes_no_room_but_where_another_process_makes_it(own_cache):
    with pytest.raises(OSError, match="No space left"):
        feature_cache.shared("full", lambda writer: no_room(make(writer)), CPU)
    assert not (own_cache / "full.part").exists()
    for name in ("died.part", "made.part", "half.gone"):
        (own_cache / name).mkdir()
        (own_cache / name / "a").write_bytes(b"half")
    with feature_cache._locked(own_cache / "made.lock"):
        feature_cache.shared("name", make, CPU)
    assert {path.name for path in own_cache.iterdir() if path.is_dir()} == {"name", "made.part"}


def no_room(_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_beyond_the_limit_what_was_not_used_for_longest_goes(own_cache, monkeypatch):
    monkeypatch.setattr(feature_cache, "LIMIT_ALL", 2 * 400)
    held = feature_cache.shared("first", make, CPU)
    size = sum(file.stat().st_size for file in (own_cache / "first").iterdir())
    monkeypatch.setattr(feature_cache, "LIMIT_ALL", int(2.5 * size))
    for age, name in ((30, "first"), (20, "second"), (10, "third")):
        feature_cache.shared(name, make, CPU)
        os.utime(own_cache / name, (time.time() - age,) * 2)
    feature_cache.shared("second", make, CPU)
    feature_cache.shared("fourth", make, CPU)
    left = {path.name for path in own_cache.iterdir() if path.is_dir()}
    assert left == {"second", "fourth"}
    assert held["a"].sum() == 16, "who has them mapped keeps them"
