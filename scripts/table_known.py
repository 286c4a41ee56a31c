"""Every known loss on the heads of the proxies, with intervals: docs/known_losses.md.

    # the table, of what is trained, and the same once what is missing has been
    python scripts/table_known.py faster_rcnn_proxy atss_proxy
    python scripts/table_known.py faster_rcnn_proxy --measure --seeds 0 1 2

The rows are the benchmark's (docs/lossbench): what it has is not trained again, and a row is
appended to it as a training is done; stop it when you like, start it again.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from trainings import Instrument, Wanted, measure

from cse_autoloss.canonical import canonical
from cse_autoloss.errors import UserError
from cse_autoloss.intervals import Interval, LossAndSeed, mean_interval, paired_interval
from cse_autoloss.lossbench import FOLDER, TASKS, Loss, Row, of_one_origin, read_rows
from cse_autoloss.report import table
from cse_autoloss.space import load_space

PAGE = Path(__file__).resolve().parents[1] / "docs" / "known_losses.md"
DETECTORS = {
    f"{name}_proxy": f"{stage}_stage_cls"
    for stage, names in (
        ("two", ("faster_rcnn", "faster_rcnn_r101", "cascade_rcnn", "mask_rcnn")),
        ("one", ("fcos", "atss")),
    )
    for name in names
}
DEFAULT = "default"
WELL = 0.8  # of the default's mAP: what trains to less has a noise of its own


@dataclass(frozen=True)
class Known:
    """A known loss in one branch, the other branch's the detector's default; or both defaults."""

    name: str
    branch: str | None = None
    space: str = ""
    expression: str = ""

    @property
    def title(self) -> str:
        """As the benchmark names it: a name may be that of a loss in each branch."""
        return f"reg {self.name}" if self.branch == "reg" else self.name

    def is_of(self, row: Row) -> bool:
        """Whether a training is of this loss, under whatever name."""
        if self.branch is None or set(row.losses) != {self.branch}:
            return self.branch is None and not row.losses
        mine = _canonical(self.expression, self.space)
        return mine is not None and mine == _canonical(row.losses[self.branch], self.space)


@functools.cache
def _canonical(text: str, space: str) -> str | None:
    """The one text of all that compute the same; None of what is not in the space."""
    try:
        return str(canonical(load_space(space).expression(text), load_space(space)))
    except UserError:
        return None


def known_losses(detector: str) -> Iterator[Known]:
    """The default, and every known loss that the detector's heads can compute."""
    yield Known(DEFAULT)
    for branch, base in (("cls", DETECTORS[detector]), ("reg", "reg")):
        space = load_space(f"{base}_plus")
        for loss in space.losses.values():
            yield Known(loss.name, branch, space.origin, str(loss.expression))


def train(detector: str, options: argparse.Namespace) -> None:
    """Append a row for each known loss and seed that has none."""
    instrument = Instrument.of(
        {"config": detector, "data_seed": 0, "device": options.device}, "head"
    )
    there = [row for row in trainings(detector) if row.origin == instrument.origin]
    wanted = missing(known_losses(detector), options.seeds, there)
    measure(instrument, wanted, _path(detector), options.processes)


def missing(
    losses: Iterable[Known], seeds: Sequence[int], there: Sequence[Row]
) -> Iterator[Wanted]:
    """Trainings of these losses with these seeds that have no row yet."""
    for loss in losses:
        for seed in seeds:
            if not any(row.seed == seed and loss.is_of(row) for row in there):
                branch = loss.branch
                yield Wanted(
                    Loss(loss.title, {branch: loss.expression} if branch else {}),
                    seed,
                    {branch: loss.space} if branch else {},
                )


def trainings(detector: str) -> list[Row]:
    """Of heads."""
    return read_rows(_path(detector))


def _path(detector: str) -> Path:
    return FOLDER / detector / TASKS["head"]


@dataclass(frozen=True)
class Measured:
    """What a detector's known losses came to.

    Attributes:
        losses: all that its heads can compute.
        rows: of the warm-up and config that most of them trained with.
        scores: split to each loss's points of mAP by seed, of those that have trained.
        gains: split to each one's gain over the default.
    """

    losses: Sequence[Known]
    rows: Sequence[Row]
    scores: Mapping[str, Mapping[Known, Mapping[int, float]]]
    gains: Mapping[str, Mapping[Known, Interval]]

    @classmethod
    def of(cls, detector: str) -> Measured | None:
        """None where none has trained."""
        known = list(known_losses(detector))
        rows = [row for row in trainings(detector) if any(loss.is_of(row) for loss in known)]
        if not rows:
            return None
        rows = of_one_origin(rows)
        scores = {split: points(known, rows, split) for split in ("val", "test")}
        gains = {split: gains_over_default(of) for split, of in scores.items()}
        return cls(known, rows, scores, gains)


def side_by_side(measured: Mapping[str, Measured]) -> list[str]:
    """Tables of gains on test: the detectors whose losses are in one space beside each other."""
    lines: list[str] = []
    for space in dict.fromkeys(DETECTORS[detector] for detector in measured):
        detectors = [detector for detector in measured if DETECTORS[detector] == space]
        gains = {detector: measured[detector].gains["test"] for detector in detectors}
        first, *others = gains.values()
        shared = [loss for loss in first if loss.branch and all(loss in of for of in others)]
        mean = {
            loss: sum(gains[d][loss].mean for d in detectors) / len(detectors) for loss in shared
        }
        cells = [
            [
                loss.branch or "",
                loss.name,
                *(_told(gains[detector][loss], interval=False) for detector in detectors),
                f"{mean[loss]:+.2f}",
            ]
            for loss in sorted(shared, key=lambda loss: -mean[loss])
        ]
        names = [detector.removesuffix("_proxy") for detector in detectors]
        lines += table(["branch", "loss", *names, "mean"], cells)
    return lines


def section(detector: str, measured: Measured) -> list[str]:
    """The table of a detector."""
    scores, gains, trained = measured.scores, measured.gains, list(measured.scores["val"])
    lines = [
        f"## {detector}",
        "",
        f"{measured.rows[0].steps} steps of the head, gradient norms as multiples of the "
        f"default's: {dict(measured.rows[0].scale)}.",
        "",
    ]
    means = {
        loss: {split: mean_interval([*of[loss].values()]).mean for split, of in scores.items()}
        for loss in trained
    }
    cells = [
        [
            loss.branch or "",
            loss.name,
            str(len(scores["val"][loss])),
            *(f"{means[loss][split]:.1f}" for split in scores),
            *(_told(gains[split][loss]) if loss.branch else "" for split in scores),
        ]
        for loss in sorted(trained, key=lambda loss: -sum(means[loss].values()))
    ]
    columns = ["branch", "loss", "seeds", "val", "test", "val, over default", "test, over default"]
    lines += table(columns, cells)[:-1]
    missing = [f"{loss.name} ({loss.branch})" for loss in measured.losses if loss not in trained]
    if missing:
        lines += ["", f"Not measured yet: {', '.join(missing)}."]
    return [*lines, ""]


def points(
    losses: Iterable[Known], rows: Sequence[Row], split: str
) -> dict[Known, dict[int, float]]:
    """Of each loss that has trained, seed to points of mAP."""
    scores = {
        loss: {row.seed: 100 * (getattr(row, split) or 0.0) for row in rows if loss.is_of(row)}
        for loss in losses
    }
    return {loss: by_seed for loss, by_seed in scores.items() if by_seed}


def _told(gain: Interval, interval: bool = True) -> str:
    """Bold where the whole interval is above 0."""
    text = gain.text(2, sign=True) if interval else f"{gain.mean:+.2f}"
    return f"**{text}**" if gain.above_zero else text


def gains_over_default(scores: Mapping[Known, Mapping[int, float]]) -> dict[Known, Interval]:
    """Over the default, with the noise of all losses that train well together; the others, whose
    noise is another, paired with it alone."""
    base = Known(DEFAULT)
    least = WELL * mean_interval([*scores[base].values()]).mean
    well = {loss: of for loss, of in scores.items() if mean_interval([*of.values()]).mean > least}
    fit = LossAndSeed(well)
    return {
        loss: fit.gain(loss, base) if loss in well else paired_interval(of, scores[base])
        for loss, of in scores.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("detectors", nargs="*", default=list(DETECTORS), metavar="DETECTOR")
    parser.add_argument("--measure", action="store_true", help="train what is missing")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--processes", type=int, default=1, help="that train side by side")
    options = parser.parse_args()
    for name in options.detectors:
        if name not in DETECTORS:
            parser.error(f"no detector {name!r}: expected some of {', '.join(DETECTORS)}")
    if options.measure:
        for detector in options.detectors:
            train(detector, options)
    text = [
        "# Known losses, measured",
        "",
        "Each known loss ([losses.md](losses.md)) in one branch, the other branch's loss the "
        "detector's default. Heads alone are",
        "trained, on cached features of one frozen warm trunk ([instrument.md](instrument.md)), on "
        "the embedded data set; with a",
        "seed all see the same images in the same order. Points of mAP. Gains have 95% intervals "
        "(Student's t) of a fit of mAP = loss + seed +",
        "noise to all losses of a table, so that all of them tell the noise; a loss with less than "
        f"{WELL:.0%} of the default's mAP is left out of it, and",
        "paired with the default alone. Bold is what lies above 0; of many gains that are nothing, "
        "one in twenty is outside its interval.",
        "Written by `python scripts/table_known.py`.",
        "",
    ]
    found = {detector: Measured.of(detector) for detector in options.detectors}
    measured = {detector: of for detector, of in found.items() if of}
    text += [
        "## Side by side",
        "",
        "Gains over the default on test; their intervals are below.",
        "",
    ]
    text += side_by_side(measured)
    text += [line for name, of in measured.items() for line in section(name, of)]
    if unmeasured := [detector for detector, of in found.items() if not of]:
        text += [f"Not measured yet: {', '.join(unmeasured)}.", ""]
    PAGE.write_text("\n".join(text), encoding="utf-8")
    print(f"{PAGE} written")


if __name__ == "__main__":
    main()
