"""What runs on the nodes of a cluster: actors that hold a trainer and train one trial after
another.

A worker is an actor that has imported the detection library and holds the data, so a trial pays for
its training only. Text (JSON) goes in and comes back. A worker may be several processes that train
each trial together: the actor that the cluster talks to, and others that it starts and that end
with it.

A training that fails is a result. A fault of the machine is none: it is raised, and the cluster
tries the trial again elsewhere.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import ray

from cse_autoloss.trial import Trial, TrialResult, load_trainer

# How messages begin, or what they have in them, of errors that torch raises as RuntimeError and
# that no loss is to blame for.
_MACHINE = (
    "CUDA error",
    "CUDA out of memory",
    "CUDA driver",
    "cuBLAS",
    "CUBLAS_STATUS",
    "cuDNN error",
    "CUDNN_STATUS",
    "NCCL",
    "can't allocate memory",
    "DataLoader worker",
    "Connection closed by peer",
)


#: Makes a class one of actors that are not restarted: the cluster replaces them.
REMOTE = ray.remote(max_restarts=0, max_task_retries=0)


class MachineFault(RuntimeError):
    """A trial ended by what is no fault of its loss: memory, disk, GPU, another process's death."""


class TrialWorker:
    """Trains trials, alone or as the first of several processes.

    Args:
        search_path: folders that modules may be imported from beside the usual ones.
    """

    def __init__(self, search_path: Sequence[str] = ()) -> None:
        _set_up(search_path)
        self._search_path = search_path
        self._others: list[Any] = []
        self._trainer: Any = None

    def place(self) -> str:
        """The node that the worker has its room on."""
        return str(ray.get_runtime_context().get_node_id())

    def prepare(self, trainer: str, options: Mapping[str, Any]) -> bytes:
        """What all trials start from."""
        try:
            return load_trainer(trainer).prepare(options)
        except Exception as error:
            _raise_machine_fault(error)
            raise

    def load(
        self,
        trainer: str,
        options: Mapping[str, Any],
        prepared: bytes,
        processes: int = 1,
        resources: Mapping[str, float] | None = None,
    ) -> None:
        """Make the trainer; returns when the worker can take trials.

        Args:
            processes: how many train together. This actor starts the others, in its own placement
                group, and Ray ends them when it ends.
            resources: of each process, as for an actor's ``options``.
        """
        if processes > 1:
            address = f"tcp://{ray.util.get_node_ip_address()}:{_free_port()}"
            self._others = [
                REMOTE(_Other)
                .options(**resources or {})
                .remote(self._search_path, trainer, options, prepared, (address, rank, processes))
                for rank in range(1, processes)
            ]
            _join(address, 0, processes)
        self._trainer = load_trainer(trainer)(options, prepared)
        ray.get([other.ready.remote() for other in self._others])

    def ping(self) -> None:
        """Returns: the worker lives."""

    def train(self, trial_json: str) -> str:
        theirs = [other.train.remote(trial_json) for other in self._others]
        result = _train(self._trainer, trial_json)
        ray.get(theirs)  # raises where one has died: the group is broken for good
        return result


class _Other:
    """One more process of a worker. It trains what the first does; that one's result counts."""

    def __init__(
        self,
        search_path: Sequence[str],
        trainer: str,
        options: Mapping[str, Any],
        prepared: bytes,
        place: tuple[str, int, int],
    ) -> None:
        _set_up(search_path)
        _join(*place)
        self._trainer = load_trainer(trainer)(options, prepared)

    def ready(self) -> None:
        """Returns when the process can take trials."""

    def train(self, trial_json: str) -> None:
        _train(self._trainer, trial_json)


def _set_up(search_path: Sequence[str]) -> None:
    """To be called before anything asks for a GPU: current Ray leaves all of a node's in sight of a
    process without any."""
    if not ray.get_gpu_ids():
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    sys.path += [folder for folder in search_path if folder not in sys.path]


def _train(trainer: Any, trial_json: str) -> str:
    trial = Trial.from_json(trial_json)
    started = time.monotonic()
    try:
        result = trainer.train(trial)
    except Exception as error:  # a trial that raises is a failed result; the worker goes on
        _raise_machine_fault(error)
        result = TrialResult.failed(
            trial, f"{type(error).__name__}: {error}", time.monotonic() - started
        )
    if result.mAP is None:
        _check_gpu()
    return str(result.to_json())


def _raise_machine_fault(error: Exception) -> None:
    """Raise MachineFault if the error is one, in a form that any driver can read."""
    text, name = str(error), type(error).__name__
    if (
        isinstance(error, (MemoryError, OSError, ray.exceptions.RayError))
        or name in ("OutOfMemoryError", "AcceleratorError")  # torch's, which need not be imported
        or (isinstance(error, RuntimeError) and any(mark in text for mark in _MACHINE))
    ):
        raise MachineFault(f"{name}: {text}"[:2000]) from None


def _check_gpu() -> None:
    """Raise MachineFault if the GPU does no more work for this process: after some errors it never
    does again, and every later trial would fail."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except Exception as error:
            raise MachineFault(f"the GPU's context is broken: {error}"[:2000]) from None


def _join(address: str, rank: int, processes: int) -> None:
    import torch

    torch.distributed.init_process_group(
        "nccl" if torch.cuda.is_available() else "gloo",
        init_method=address,
        rank=rank,
        world_size=processes,
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
