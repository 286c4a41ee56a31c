"""Random candidates of a space, generated and screened by the million, on one core or on many."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from cse_autoloss.screening.equivalence import Seen
from cse_autoloss.screening.properties import PROPERTIES
from cse_autoloss.screening.screener import ACCEPTED, BATCH_SIZE, Screener
from cse_autoloss.space import SearchSpace, load_space
from cse_autoloss.variation import grow

# Candidates of one random stream: what is drawn depends on the seed, not on who draws it.
CHUNK = 65_536


@dataclass(frozen=True)
class Sample:
    """What became of random candidates.

    Attributes:
        generated, unique: how many were drawn, and how many of them are no duplicates.
        rejected: property to the number of unique candidates that fell to it.
        survivors: texts, in the order of their drawing.
        seconds: wall-clock time of drawing and screening.
    """

    generated: int
    unique: int
    rejected: dict[str, int]
    survivors: tuple[str, ...]
    seconds: float


def sample(
    space: SearchSpace,
    count: int,
    seed: int,
    depths: tuple[int, int] = (2, 6),
    batch_size: int = BATCH_SIZE,
    workers: int | None = None,
) -> Sample:
    """Draw and screen ``count`` candidates. The result but for its time is the same for any number
    of workers.

    Args:
        depths: lowest and highest depth limit of a tree.
        batch_size: candidates that share a graph.
        workers: processes that Ray starts on this machine; None for none: all is done in this one.
    """
    sizes = [min(CHUNK, count - start) for start in range(0, count, CHUNK)]
    if workers is None:
        sampler = Sampler(space.origin, seed, depths, batch_size)
        started = time.monotonic()
        return _merge(
            count, (sampler.chunk(number, size) for number, size in enumerate(sizes)), started
        )
    import ray

    from cse_autoloss.ray_session import start_ray

    start_ray(workers)
    try:
        remote = ray.remote(num_cpus=1)(Sampler)
        samplers = [remote.remote(space.origin, seed, depths, batch_size) for _ in range(workers)]
        ray.get([sampler.ready.remote() for sampler in samplers])
        started = time.monotonic()
        results = [
            samplers[number % workers].chunk.remote(number, size)
            for number, size in enumerate(sizes)
        ]
        return _merge(count, map(ray.get, results), started)
    finally:
        ray.shutdown()


Chunk = tuple[np.ndarray, np.ndarray, list[str]]  # hashes, verdict codes, texts of the accepted


class Sampler:
    """Draws and screens chunks, whose numbers only rise: what it has seen before came before."""

    def __init__(self, origin: str, seed: int, depths: tuple[int, int], batch_size: int) -> None:
        self._space, self._seed, self._depths = load_space(origin), seed, depths
        self._screener = Screener(self._space, batch_size)

    def ready(self) -> None:
        """Returns when the sampler can begin."""

    def chunk(self, number: int, size: int) -> Chunk:
        report = self._screener.screen(
            grow(np.random.default_rng([self._seed, number]), size, self._space, *self._depths)
        )
        return report.hashes, report.codes, [str(expression) for expression in report.survivors]


def _merge(count: int, chunks: Iterable[Chunk], started: float) -> Sample:
    """Put chunks together in their order; a candidate that two of them have is the earlier
    one's."""
    seen, tally, survivors = Seen(), np.zeros(len(PROPERTIES), np.int64), []
    for hashes, codes, texts in chunks:
        fresh = seen.add(hashes)
        survivors += [text for text, new in zip(texts, fresh[codes == ACCEPTED]) if new]
        tally += np.bincount(codes[fresh & (codes >= 0)], minlength=len(PROPERTIES))
    return Sample(
        count,
        len(seen),
        dict(zip(PROPERTIES, tally.tolist())),
        tuple(survivors),
        time.monotonic() - started,
    )
