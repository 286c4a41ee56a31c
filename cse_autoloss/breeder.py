"""Rounds of proposals made in a process of their own, while the driver hands out and collects
trainings."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Protocol

from cse_autoloss.config import Config, parse_config
from cse_autoloss.errors import SearchError, UserError
from cse_autoloss.journal import Journal
from cse_autoloss.proposals import Proposals, Round


class BreederError(SearchError):
    """The process that makes proposals ended, or failed: what it said last."""


class Breeder(Protocol):
    """Makes one round at a time."""

    @property
    def busy(self) -> bool:
        """Whether a round was begun that has not been taken."""

    def begin(self, number: int, count: int) -> None:
        """Begin the round of this number, of so many proposals; not while one is being made."""

    def take(self, timeout: float = 0.0) -> Round | None:
        """The round that was begun, if it is there after at most ``timeout`` seconds."""

    def close(self) -> None: ...


class InlineBreeder:
    """Makes a round on the spot, in this process."""

    def __init__(self, make: Callable[[int, int], Round]) -> None:
        self._make = make
        self._round: Round | None = None

    @classmethod
    def of(cls, config: Config, spaces: Mapping[str, str], journal: Journal) -> InlineBreeder:
        return cls(Proposals(config, spaces, journal).next_round)

    @property
    def busy(self) -> bool:
        return self._round is not None

    def begin(self, number: int, count: int) -> None:
        self._round = self._make(number, count)

    def take(self, timeout: float = 0.0) -> Round | None:
        made, self._round = self._round, None
        return made

    def close(self) -> None:
        pass


class ProcessBreeder:
    """Makes rounds in a child process, which reads the run from its journal as it stands when a
    round begins, and ends with its parent, however that ends."""

    def __init__(self, folder: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(folder, theirs), name="cse-autoloss proposals", daemon=True
        )
        self._process.start()
        theirs.close()
        self._busy = False

    @property
    def busy(self) -> bool:
        return self._busy

    def begin(self, number: int, count: int) -> None:
        try:
            self._connection.send((number, count))
        except OSError as error:
            raise self._ended() from error
        self._busy = True

    def take(self, timeout: float = 0.0) -> Round | None:
        try:
            if not self._busy or not self._connection.poll(timeout):
                return None
            made = self._connection.recv()
        except (EOFError, OSError) as error:
            raise self._ended() from error
        self._busy = False
        if isinstance(made, str):
            raise BreederError(f"no proposals could be made: {made}")
        return made

    def close(self) -> None:
        self._connection.close()
        self._process.terminate()
        self._process.join()

    def _ended(self) -> BreederError:
        self._process.join(5)
        return BreederError(
            f"the process that makes proposals ended with exit code {self._process.exitcode}; "
            "if it was killed for memory, lower search.offspring or search.batch_size"
        )


def _serve(folder: Path, connection: Connection) -> None:
    """Answer requests for rounds until the parent is gone."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    try:
        journal = Journal.read(folder)
        proposals = Proposals(parse_config(journal["config"]), journal["spaces"], journal)
        while True:
            connection.send(proposals.next_round(*connection.recv()))
    except (EOFError, OSError, KeyboardInterrupt):
        pass  # the parent is gone, or goes
    except Exception as error:
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        connection.send(f"{kind}{error}")
