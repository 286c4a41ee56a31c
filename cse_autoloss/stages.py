"""The ladder that candidates climb, as data: what each stage trains, and how many go on from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from cse_autoloss.trial import ConfigError

TUNE = "tune"  # before the ladder: the default losses' trainings at the comparison's measure
REFERENCE = "default"  # the tuned default losses at the search's last stage, if that measures else
SEEDS = 1000  # trainings of one candidate at one stage, at most: each stage's seeds are its own
EVALUATION = 3  # the block of so many seeds that is ``evaluate``'s, and no stage's
Count = Annotated[int, Field(gt=0, le=1_000_000)]
Split = Literal["val", "test"]


class Stage(BaseModel):
    """One stage.

    The first stages make up the search. From all of them but the last the best of each ``batch``
    go on; what the last one measures is fitness. The stages with ``best`` come after the search.
    The very last is the comparison, in which the default, the released and other losses take part.

    Attributes:
        task: what is trained (see ``trial.Trial``).
        share: of that task's steps.
        seeds: trainings of a candidate: all of them after the search; at most so many at the
            search's last stage, where a candidate earns those after the first (``search.race``).
        splits: that mAP is measured on, the first of which counts: val, and test in the comparison,
            unless given.
        batch, keep: of each ``batch`` candidates that have a score here, the best ``keep`` go on.
        best: how many of the best so far take part, after the search; 0 for none.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    task: Literal["tiny", "head", "full"] = "full"
    share: Annotated[float, Field(gt=0, le=1)] = 1.0
    seeds: Annotated[int, Field(gt=0, le=SEEDS)] = 1
    splits: Annotated[tuple[Split, ...], Field(min_length=1)] | None = None
    batch: Count | None = None
    keep: Count | None = None
    best: Annotated[int, Field(ge=0, le=1_000_000)] | None = None


DEFAULT_STAGES = {
    "tiny": Stage(task="tiny", batch=8, keep=3),
    "full": Stage(),
    "confirm": Stage(best=5, seeds=2),
    "final": Stage(best=2, seeds=3),
}


@dataclass(frozen=True)
class Ladder:
    """The stages in order.

    Attributes:
        search: names of the search's stages; the last one measures fitness.
        closing: names of those after the search; the last one is the comparison.
    """

    stages: Mapping[str, Stage]
    search: tuple[str, ...]
    closing: tuple[str, ...]

    @classmethod
    def of(cls, stages: Mapping[str, Stage]) -> Ladder:
        """Read a run's ``stages``.

        Raises:
            ConfigError: if they are no ladder.
        """
        search = tuple(name for name, stage in stages.items() if stage.best is None)
        closing = tuple(name for name, stage in stages.items() if stage.best is not None)
        if {TUNE, REFERENCE} & set(stages) or not all(name.isidentifier() for name in stages):
            raise ConfigError(
                f"stages: names are single words other than {TUNE!r} and {REFERENCE!r}, found "
                f"{', '.join(stages)}"
            )
        if not search or not closing or tuple(stages) != search + closing:
            raise ConfigError(
                "stages: first the search's, then those with 'best', which come after it; at "
                f"least one of each, found {', '.join(stages) or 'none'}"
            )
        for name, stage in stages.items():
            filters = name in search[:-1]
            if (stage.batch, stage.keep) != (None, None) and not filters:
                raise ConfigError(
                    f"stages.{name}: 'batch' and 'keep' belong to the search's stages before its "
                    f"last, {search[-1]}"
                )
            if filters and not (stage.batch and stage.keep and stage.keep <= stage.batch):
                raise ConfigError(
                    f"stages.{name}: the best 'keep' of each 'batch' go on to the next stage: "
                    f"expected both, keep at most batch; found batch {stage.batch}, keep "
                    f"{stage.keep}"
                )
            if filters and stage.seeds > 1:
                raise ConfigError(f"stages.{name}.seeds: 1 before the search's last stage")
        return cls(stages, search, closing)

    @property
    def fitness(self) -> str:
        """The stage whose mAP is a candidate's fitness."""
        return self.search[-1]

    @property
    def comparison(self) -> str:
        return self.closing[-1]

    @property
    def needs_reference(self) -> bool:
        """Whether the search's last stage trains something else than the comparison does, so that
        the default losses have to be measured there, too."""
        one, other = self.stages[self.fitness], self.stages[self.comparison]
        return (one.task, one.share) != (other.task, other.share)

    def following(self, name: str) -> str:
        """The search's stage after one that is not its last."""
        return self.search[self.search.index(name) + 1]

    def splits(self, name: str) -> tuple[str, ...]:
        default = ("val", "test") if name == self.comparison else ("val",)
        return self.stages[name].splits or default

    def first_seed(self, name: str) -> int:
        """Where a stage's seeds begin, from the run's seed on: the search's stages share theirs,
        those after it have their own, which are not ``evaluate``'s either."""
        if name not in self.closing:
            return 0
        place = self.closing.index(name) + 1
        return SEEDS * (place + (place >= EVALUATION))

    def same_measure(self, name: str) -> tuple[str, ...]:
        """The stages that train and measure what this one does."""
        stage = self.stages[name]
        return tuple(
            other
            for other, its in self.stages.items()
            if (its.task, its.share, self.splits(other))
            == (stage.task, stage.share, self.splits(name))
        )


def places_in_batches(scores: Mapping[int, float], stage: Stage) -> dict[int, int]:
    """Place in its batch, from 1, of each candidate that has a score at a stage; candidates make up
    batches in the order of their numbers, and those of the last, unfinished one wait."""
    places: dict[int, int] = {}
    numbers, size = sorted(scores), stage.batch or 1
    for start in range(0, len(numbers) - size + 1, size):
        batch = sorted(numbers[start : start + size], key=lambda number: -scores[number])
        places |= {number: place for place, number in enumerate(batch, 1)}
    return places
