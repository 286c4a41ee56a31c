"""Ray, started here or joined, and left again."""

from __future__ import annotations

import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Show a cluster this user's token, if there is one. For a cluster that is joined by its address Ray
# does so only where this variable says it, and reads it when it is imported.
if "RAY_AUTH_MODE" not in os.environ and "ray" not in sys.modules:
    _TOKEN = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", "~/.ray/auth_token")).expanduser()
    if os.environ.get("RAY_AUTH_TOKEN") or _TOKEN.is_file():
        os.environ["RAY_AUTH_MODE"] = "token"

import ray
from ray._private import ray_constants
from ray._private import utils as ray_utils

from cse_autoloss.config import ClusterSection
from cse_autoloss.errors import SearchError

ASK_EVERY = 2.0  # seconds between two looks whether what Ray cannot do without is there
GONE = {"head": 30.0, "raylet": 4.0}  # seconds; Ray itself waits for 60, and for 10 or so
_JOIN_SECONDS = "10"
_QUIET = {"log_to_driver": False, "logging_level": "error"}


class ClusterError(SearchError):
    """The cluster cannot do what is asked: no resources, or workers that do not start."""


def check_machine(section: ClusterSection) -> None:
    """Whether the workers' CPUs are there, where the cluster is this machine alone. One that is
    joined may grow; what fits there is seen once it is joined.

    Raises:
        ClusterError: one line: what does not fit, and what would.
    """
    if _address(section):
        return
    cores, processes = os.cpu_count() or 1, section.processes
    workers, each = section.workers or 1, processes * section.num_cpus
    if workers * each > cores + 1e-9:
        fit = math.floor(cores / each + 1e-9)
        share = math.floor(1e4 * cores / (workers * processes)) / 1e4
        together = f" for {processes} processes" if processes > 1 else ""
        raise ClusterError(
            f"cluster: {workers} workers of {each:g} CPUs{together} do not fit: this machine has "
            f"{cores}; "
            + (f"cluster.workers={fit} or " if fit else "")
            + f"cluster.num_cpus={share:g} "
            "does"
        )


def open_ray(section: ClusterSection) -> bool:
    """Join the cluster at ``section.address`` or ``$RAY_ADDRESS``, or start one on this machine.

    Returns:
        Whether it was joined.

    Raises:
        ClusterError: one line: why not.
    """
    address = _address(section)
    check_machine(section)
    if address is None:
        start_ray(os.cpu_count())
        return False
    _stay_on_this_machine(False)
    os.environ.setdefault("RAY_gcs_server_port_wait_time_s", _JOIN_SECONDS)
    try:
        with _signals_kept():
            _check_reachable(address)
            ray.init(address=address, **_QUIET)
    except Exception as error:  # Ray raises plain Exception, too
        ray.shutdown()
        raise ClusterError(
            f"cluster.address: cannot reach a Ray cluster at {address}: {_why(error)}"
        ) from error
    return True


def start_ray(cpus: int | None) -> None:
    """Start Ray on this machine, for this machine alone.

    Args:
        cpus: that its actors share.

    Raises:
        ClusterError: one line: why not.
    """
    _stay_on_this_machine(True)
    # Ray lets its workers give way to all else, by 15; what they do is what this is for.
    os.environ.setdefault("RAY_worker_niceness", "0")
    try:
        with _signals_kept():
            ray.init(address="local", num_cpus=cpus, include_dashboard=False, **_QUIET)
    except Exception as error:
        ray.shutdown()
        raise ClusterError(
            "Ray cannot be started on this machine (a busy one may take longer than Ray waits; "
            f"then try again): {_last_line(error)}"
        ) from error


class Lifelines:
    """The processes of Ray's that this one ends with, by Ray's doing and without a word: the
    cluster's head, and the raylet of this process's node."""

    def __init__(self) -> None:
        self._places: dict[str, tuple[str, int]] = {}
        if not ray.util.client.ray.is_connected():  # a client has none
            context = ray.get_runtime_context()
            host, _, port = context.gcs_address.rpartition(":")
            self._places["head"] = host.strip("[]"), int(port)
            for node in ray.nodes():
                if node["NodeID"] == context.get_node_id():
                    self._places["raylet"] = node["NodeManagerAddress"], node["NodeManagerPort"]
        self._asked = time.monotonic()
        self._answered = dict.fromkeys(self._places, self._asked)

    def check(self) -> None:
        """Ask, every few seconds, whether they are there.

        Raises:
            ClusterError: one has not been there for as long as ``GONE`` says.
        """
        now = time.monotonic()
        if now - self._asked < ASK_EVERY:
            return
        self._asked = now
        for name, place in self._places.items():
            try:
                socket.create_connection(place, timeout=ASK_EVERY).close()
                self._answered[name] = now
            except OSError as error:
                if now - self._answered[name] >= GONE[name]:
                    raise ClusterError(
                        f"Ray's {name} at {place[0]}:{place[1]} has been gone for "
                        f"{GONE[name]:g} s: {error}"
                    ) from error


def _address(section: ClusterSection) -> str | None:
    return section.address or os.environ.get("RAY_ADDRESS")


def _stay_on_this_machine(local: bool) -> None:
    """Let a local cluster listen on the loopback interface alone.

    By Ray's own switch for Windows and macOS, which it reads when it is imported, and its processes
    read when they start.
    """
    name = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
    if local:
        os.environ[name] = "0"
    else:
        os.environ.pop(name, None)
    ray_constants.ENABLE_RAY_CLUSTER = not local


@contextmanager
def _signals_kept() -> Iterator[None]:
    """Ray takes SIGTERM for itself: at once, to exit with 15, and once it has connected, to print a
    stack when it comes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    # Private: a Ray that has it no longer starts all the same, and the signal is kept afterwards.
    set_sigterm_handler = getattr(ray_utils, "set_sigterm_handler", None)
    if set_sigterm_handler:
        ray_utils.set_sigterm_handler = lambda handler: None
    try:
        yield
    finally:
        if set_sigterm_handler:
            ray_utils.set_sigterm_handler = set_sigterm_handler
        for number, handler in before.items():
            signal.signal(number, handler)


def _check_reachable(address: str) -> None:
    """Raise OSError at once where nobody listens; Ray itself would go on asking for many
    minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host, int(port)), timeout=10).close()


def _why(error: BaseException) -> str:
    """The reason, looked for in what the error came from, too."""
    cause: BaseException | None = error
    while cause is not None:
        if type(cause).__name__ == "AuthenticationError":
            return (
                "it asks for a token that this driver does not have or that is another: put the "
                "cluster's into ~/.ray/auth_token or RAY_AUTH_TOKEN, with RAY_AUTH_MODE=token"
            )
        cause = cause.__cause__ or cause.__context__
    return _last_line(error)


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:300]
