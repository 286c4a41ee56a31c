"""What strategies of search are worth, replayed on the table of trainings in docs/lossbench.

    python scripts/bench_strategies.py model             # leave one out: does the model rank?
    python scripts/bench_strategies.py race              # who earns the next seed? (simulated)
    python scripts/bench_strategies.py replay            # regret against detector seconds
    python scripts/bench_strategies.py replay --detector atss_proxy --repetitions 20

``replay`` draws docs/strategies.png and prints the tables of docs/strategies.md, which says what a
table can show and what it cannot.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr

from cse_autoloss import lossbench
from cse_autoloss.intervals import mean_interval
from cse_autoloss.racing import Race
from cse_autoloss.rankers import Measured, Ranker, load_ranker
from cse_autoloss.rankers.base import FLOOR
from cse_autoloss.screening.features import features
from cse_autoloss.space import load_space

REPETITIONS = 100
KNOWN = 4  # losses that every strategy starts from, as a run does
BATCH = 4  # trainings between two looks at the model, as four workers would have it


# --- the table ---


@dataclass(frozen=True)
class Table:
    """Losses with what is known of them.

    Attributes:
        features: (n, d)
        scores: for each loss, mAP on val by seed.
        truth: (n,) what the replay takes for the loss's true mAP: the mean over seeds, and over val
            and test, drawn towards the sound losses' mean as far as its noise demands.
        noise: standard deviation of one training's mAP on val about its loss's mean.
        seconds: CPU seconds of a training of the head.
    """

    features: np.ndarray
    scores: list[dict[int, float]]
    truth: np.ndarray
    noise: float
    seconds: float

    @property
    def sound(self) -> np.ndarray:
        return self.truth > self.truth.max() - FLOOR


def read_table(detector: str, folder: Path) -> Table:
    """The head's trainings with the detector's most used warm-up and config, losses that have a
    gradient and at least two seeds."""
    rows = lossbench.of_one_origin(lossbench.load(detector, "head", folder))
    table = lossbench.table(rows)
    spaces = {
        "cls": load_space("two_stage_cls" if "rcnn" in detector else "one_stage_cls"),
        "reg": load_space("reg"),
    }
    rows_of = features(table.losses, spaces)
    trained = ~np.isnan(table.val)
    usable = (trained.sum(axis=1) > 1) & np.isfinite(rows_of).all(axis=1)
    pick = np.flatnonzero(usable)
    scores = [
        {seed: table.val[i, k] for k, seed in enumerate(table.seeds) if trained[i, k]} for i in pick
    ]
    both = (table.val + table.test) / 2
    means = np.array([both[i, trained[i]].mean() for i in pick])
    counts = np.array([trained[i].sum() for i in pick])
    average = Measured.of(
        rows_of[pick], [dict(zip(row, both[i, trained[i]])) for row, i in zip(scores, pick)]
    )
    sound = means > means.max() - FLOOR
    error = average.noise**2 / counts[sound]
    spread = max(means[sound].var() - error.mean(), error.min())
    truth = means.copy()
    truth[sound] = means[sound].mean() + spread / (spread + error) * (
        means[sound] - means[sound].mean()
    )
    noise = Measured.of(rows_of[pick], scores).noise
    seconds = float(np.mean([row.cpu_seconds for row in rows]))
    return Table(rows_of[pick], scores, truth, noise, seconds)


# --- leave one out ---


def leave_one_out(table: Table, ranker: Ranker) -> tuple[np.ndarray, np.ndarray]:
    """(n,) each loss's mAP as predicted from the others, and the prediction's deviation."""
    mean, deviation = np.zeros((2, len(table.scores)))
    for i in range(len(mean)):
        others = [k for k in range(len(mean)) if k != i]
        measured = Measured.of(table.features[others], [table.scores[k] for k in others])
        ranking = ranker.rank(table.features[i : i + 1], measured, np.random.default_rng(0))
        mean[i], deviation[i] = ranking.mean[0], ranking.deviation[0]
    return mean, deviation


def report_model(table: Table) -> Iterator[str]:
    """Spearman's correlation with what was measured, beside that of one more training."""
    mean, deviation = leave_one_out(table, load_ranker("model"))
    measured = np.array([np.mean(list(row.values())) for row in table.scores])
    first, second = (np.array([list(row.values())[k] for row in table.scores]) for k in (0, 1))
    yield f"{len(mean)} losses, {table.sound.sum()} sound; noise of a training {table.noise:.4f}"
    yield "| | all | sound ones alone |"
    yield "|---|---|---|"
    for name, one, other in (
        ("the model, leaving one out, with the mean of the seeds", mean, measured),
        ("the model, leaving one out, with one training", mean, first),
        ("another training, with one training", second, first),
    ):
        every, sound = (
            spearmanr(one[some], other[some])[0] for some in (table.sound | True, table.sound)
        )
        yield f"| {name} | {every:.2f} | {sound:.2f} |"
    trainings = np.array([len(row) for row in table.scores])
    error = np.hypot(deviation, table.noise / np.sqrt(trainings))[table.sound]
    held = (np.abs((measured - mean)[table.sound]) < 1.96 * error).mean()
    yield f"Of the sound losses {held:.0%} lie within the 95% interval that the model gave them."


# --- the replay ---


@dataclass
class Replay:
    """One search on the table: it trains, pays, and says what it would hand back.

    A training of a loss is its truth and fresh noise; the table's own seeds are too few to race.
    """

    table: Table
    rng: np.random.Generator
    budget: float
    seconds: float = 0.0
    scores: dict[int, dict[int, float]] = field(default_factory=dict)
    regrets: list[tuple[float, float]] = field(default_factory=list)

    def train(self, loss: int, instrument: Instrument) -> float:
        self.seconds += self.table.seconds * instrument.cost
        noise = self.table.noise if instrument.noise is None else instrument.noise
        score = float(self.table.truth[loss] + noise * self.rng.normal())
        row = self.scores.setdefault(loss, {})
        row[len(row)] = score
        return score

    def recommend(self, loss: int) -> None:
        self.regrets.append((self.seconds, float(self.table.truth.max() - self.table.truth[loss])))

    def untrained(self) -> np.ndarray:
        return np.setdiff1d(np.arange(len(self.table.truth)), list(self.scores))

    @property
    def spent(self) -> bool:
        return self.seconds >= self.budget or not len(self.untrained())

    def measured(self) -> tuple[list[int], Measured]:
        losses = list(self.scores)
        return losses, Measured.of(
            self.table.features[losses], [self.scores[loss] for loss in losses]
        )


@dataclass(frozen=True)
class Instrument:
    """What a training costs, in trainings of the head, and its noise (the table's where None)."""

    cost: float = 1.0
    noise: float | None = None


HEAD = Instrument()
# 250 steps of 4 images with everything trained, beside 1,000 of 8 with the head alone: about twice
# the seconds, and 0.007 between seeds (docs/instrument.md).
FULL = Instrument(cost=2.0, noise=0.007)
TINY = Instrument(cost=0.25)  # one image of each category
# Of 60 candidates that nobody screened 23 failed at once, 8 were as good as the default, and the
# others trained in vain (docs/search.md).
UNSCREENED = {"failed": 23 / 60, "good": 8 / 60}
Strategy = Callable[[Replay], None]


def near_parent(replay: Replay, fitness: dict[int, float]) -> int:
    """An untrained loss as variation would make it: one of the ten nearest to the winner of a
    tournament of four; every fifth anywhere."""
    rest = replay.untrained()
    if replay.rng.random() < 0.2:
        return int(replay.rng.choice(rest))
    drawn = replay.rng.choice(list(fitness), 4)
    parent = max(drawn, key=fitness.__getitem__)
    rows = replay.table.features
    distance = np.linalg.norm(rows[rest] - rows[parent], axis=1)
    return int(replay.rng.choice(rest[np.argsort(distance)[:10]]))


def plain_evolution(replay: Replay) -> None:
    """The paper's baseline: whatever variation makes trains in full, once; one training is the
    fitness, the twenty best are the population."""
    fitness: dict[int, float] = {}
    for loss in replay.rng.permutation(len(replay.table.truth))[:KNOWN]:
        fitness[int(loss)] = replay.train(int(loss), FULL)
    while not replay.spent:
        replay.recommend(max(fitness, key=fitness.__getitem__))
        fate = replay.rng.random()
        if fate < UNSCREENED["failed"]:
            continue
        if fate < 1 - UNSCREENED["good"]:
            replay.seconds += replay.table.seconds * FULL.cost
            continue
        population = dict(sorted(fitness.items(), key=lambda item: -item[1])[:20])
        loss = near_parent(replay, population)
        fitness[loss] = replay.train(loss, FULL)


def screened_search(instrument: Instrument) -> Strategy:
    """Screened survivors in any order: eight train on the tiny set, three of those that learn
    there go on and train once; at the end the five fittest train twice more."""

    def run(replay: Replay) -> None:
        table, fitness = replay.table, {}
        for loss in replay.rng.permutation(len(table.truth))[:KNOWN]:
            fitness[int(loss)] = replay.train(int(loss), instrument)
        batch = table.seconds * (8 * TINY.cost + 3 * instrument.cost)
        confirm = 10 * table.seconds * instrument.cost
        while not replay.spent and replay.seconds + batch + confirm <= replay.budget:
            population = dict(sorted(fitness.items(), key=lambda item: -item[1])[:20])
            # In the order drawn: a set's is the table's, which has known losses first.
            fresh = dict.fromkeys(near_parent(replay, population) for _ in range(8))
            replay.seconds += len(fresh) * table.seconds * TINY.cost
            learns = [loss for loss in fresh if table.sound[loss]] or list(fresh)
            for loss in learns[:3]:
                fitness[loss] = replay.train(loss, instrument)
        fittest = sorted(fitness, key=fitness.__getitem__)[-5:]
        again = {
            loss: np.mean([replay.train(loss, instrument) for _ in range(2)]) for loss in fittest
        }
        replay.recommend(max(again, key=again.__getitem__))

    return run


def learning_search(ranker: Ranker, race: Race | None) -> Strategy:
    """Heads; the ranker says who trains first, the race who trains again; what is believed at any
    time is handed back."""

    def run(replay: Replay) -> None:
        for loss in replay.rng.permutation(len(replay.table.truth))[:KNOWN]:
            replay.train(int(loss), HEAD)
        while not replay.spent:
            losses, measured = replay.measured()
            belief = ranker.belief(measured)
            replay.recommend(losses[int(np.argmax(belief.mean))])
            rest = replay.untrained()
            order = iter(rest[ranker.rank(replay.table.features[rest], measured, replay.rng).order])
            running = np.zeros(len(losses))
            for _ in range(BATCH):
                again = None
                if race and replay.rng.random() < race.share:
                    again = race.decide(
                        belief, measured.trainings, measured.noise, replay.rng, running
                    ).loss
                if again is not None:
                    running[again] += 1
                    replay.train(losses[again], HEAD)
                elif (loss := next(order, None)) is not None:
                    replay.train(int(loss), HEAD)
        losses, measured = replay.measured()
        replay.recommend(losses[int(np.argmax(ranker.belief(measured).mean))])

    return run


MODEL, SHUFFLED = load_ranker("model"), load_ranker("shuffled")
STRATEGIES: dict[str, Strategy] = {
    "plain evolution": plain_evolution,
    "screened, full trainings": screened_search(FULL),
    "screened, heads": screened_search(HEAD),
    "random, heads": learning_search(SHUFFLED, None),
    "random and racing, heads": learning_search(SHUFFLED, Race()),
    "model, heads": learning_search(MODEL, None),
    "model and racing, heads": learning_search(MODEL, Race()),
}
ENDS_WITH_CONFIRMATION = ("screened, full trainings", "screened, heads")  # one run a budget


def regret_curves(
    table: Table, budgets: Sequence[float], repetitions: int
) -> dict[str, np.ndarray]:
    """Strategy to (repetitions, budgets) regret of what it would hand back by then, NaN before it
    could."""
    curves = {}
    for name, strategy in STRATEGIES.items():
        regrets = np.full((repetitions, len(budgets)), np.nan)
        for repetition in range(repetitions):
            if name in ENDS_WITH_CONFIRMATION:
                for k, budget in enumerate(budgets):
                    replay = Replay(table, np.random.default_rng(repetition), budget)
                    strategy(replay)
                    if replay.seconds <= 1.01 * budget:
                        regrets[repetition, k] = replay.regrets[-1][1]
                continue
            replay = Replay(table, np.random.default_rng(repetition), budgets[-1])
            strategy(replay)
            for k, budget in enumerate(budgets):
                known = [regret for seconds, regret in replay.regrets if seconds <= 1.01 * budget]
                regrets[repetition, k] = known[-1] if known else np.nan
        curves[name] = regrets
        print(name, "done", flush=True)
    return curves


def report_replay(
    table: Table, budgets: Sequence[float], curves: dict[str, np.ndarray]
) -> Iterator[str]:
    yield (
        f"{len(table.truth)} losses, {table.sound.sum()} sound; regret in thousandths of mAP, mean "
        f"of {len(next(iter(curves.values())))} repetitions and 95% interval"
    )
    yield "| detector seconds | " + " | ".join(f"{budget:,.0f}" for budget in budgets) + " |"
    yield "|---|" + "---|" * len(budgets)
    for name, regrets in curves.items():
        cells = [
            mean_interval((1000 * column[~np.isnan(column)]).tolist()).text(1)
            if (~np.isnan(column)).sum() > 1
            else ""
            for column in regrets.T
        ]
        yield f"| {name} | " + " | ".join(cells) + " |"


def draw_curves(budgets: Sequence[float], curves: dict[str, np.ndarray], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for name, regrets in curves.items():
        enough = (~np.isnan(regrets)).mean(axis=0) > 0.5
        intervals = [mean_interval(column[~np.isnan(column)].tolist()) for column in regrets.T]
        seconds = np.array(budgets)[enough]
        mean, low, high = (
            1000 * np.array([getattr(interval, key) for interval in intervals])[enough]
            for key in ("mean", "low", "high")
        )
        (line,) = axes.plot(seconds, mean, marker=".", label=name)
        axes.fill_between(seconds, low, high, color=line.get_color(), alpha=0.15)
    axes.set(
        xscale="log",
        xlabel="detector seconds",
        ylabel="regret: best mAP of the table minus that of\nthe loss handed back, thousandths",
        ylim=(0, None),
    )
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=110)


# --- races ---


class Track:
    """Losses in a race, each trained once; scores (losses, seeds) as they come."""

    def __init__(self, truth: np.ndarray, noise: float, rng: np.random.Generator) -> None:
        self.truth, self.noise, self.rng = truth, noise, rng
        self.scores: list[list[float]] = [[] for _ in truth]
        for loss in range(len(truth)):
            self.train(loss)

    def train(self, loss: int) -> None:
        self.scores[loss].append(float(self.truth[loss] + self.noise * self.rng.normal()))

    @property
    def trainings(self) -> int:
        return sum(map(len, self.scores))

    def by_mean(self, losses: Sequence[int] | None = None) -> list[int]:
        some = range(len(self.truth)) if losses is None else losses
        return sorted(some, key=lambda loss: -np.mean(self.scores[loss]))


def fixed_confirmation(track: Track, budget: int) -> int:
    """The five best by their first training, with all that is left shared among them."""
    best = track.by_mean()[:5]
    while track.trainings + len(best) <= budget:
        for loss in best:
            track.train(loss)
    return max(best, key=lambda loss: np.mean(track.scores[loss][1:] or track.scores[loss]))


def sequential_halving(track: Track, budget: int) -> int:
    """The better half goes on, each round with an equal share of the trainings (Karnin et al.)."""
    alive = track.by_mean()[: (len(track.truth) + 1) // 2]
    rounds = int(np.ceil(np.log2(len(alive)))) or 1
    share = (budget - track.trainings) // rounds
    while len(alive) > 1:
        for _ in range(max(1, share // len(alive))):
            for loss in alive:
                if track.trainings < budget:
                    track.train(loss)
        alive = track.by_mean(alive)[: (len(alive) + 1) // 2]
    return alive[0]


def doubling(track: Track, budget: int) -> int:
    """Challengers by their first training, each against the incumbent: both double their seeds
    until their paired difference has a sign at a level of 0.3, or eight seeds."""
    incumbent, *challengers = track.by_mean()
    for challenger in challengers:
        seeds = 2
        while track.trainings < budget:
            for loss in (incumbent, challenger):
                while len(track.scores[loss]) < seeds:
                    track.train(loss)
            pairs = zip(track.scores[challenger], track.scores[incumbent])
            gains = np.array([a - b for a, b in pairs])
            strength = gains.mean() / (track.noise * np.sqrt(2 / len(gains)))
            if abs(strength) > 1.04 or seeds >= 8:
                if strength > 0:
                    incumbent = challenger
                break
            seeds *= 2
    return incumbent


def top_two(track: Track, budget: int) -> int:
    """The product's own race."""
    race, nothing = Race(), np.zeros((len(track.truth), 0))
    while True:
        measured = Measured.of(nothing, [dict(enumerate(row)) for row in track.scores])
        decision = race.decide(
            SHUFFLED.belief(measured), measured.trainings, measured.noise, track.rng
        )
        if decision.loss is None or track.trainings >= budget:
            return decision.leader
        track.train(decision.loss)


RACES = (fixed_confirmation, sequential_halving, doubling, top_two)
NOISES = ((0.0062, 0.0033), (0.0035, 0.0036), (0.005, 0.007))  # between losses, within a loss
SIZES = ((20, 40), (20, 60), (60, 120))  # losses, trainings in all


def report_races(repetitions: int) -> Iterator[str]:
    yield "Regret in thousandths of mAP, mean and 95% interval, and trainings used"
    yield (
        "| between / within | losses, trainings | "
        + " | ".join(rule.__name__.replace("_", " ") for rule in RACES)
        + " |"
    )
    yield "|---|---|" + "---|" * len(RACES)
    for between, within in NOISES:
        for losses, budget in SIZES:
            cells = []
            for rule in RACES:
                regrets, used = [], []
                for seed in range(repetitions):
                    rng = np.random.default_rng(seed)
                    track = Track(0.48 + between * rng.normal(size=losses), within, rng)
                    winner = rule(track, budget)
                    regrets.append(1000 * (track.truth.max() - track.truth[winner]))
                    used.append(track.trainings)
                cells.append(f"{mean_interval(regrets).text(2)} ({np.mean(used):.0f})")
            yield f"| {between} / {within} | {losses}, {budget} | " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("model", "race", "replay"))
    parser.add_argument("--detector", default="faster_rcnn_proxy")
    parser.add_argument("--folder", type=Path, default=lossbench.FOLDER)
    parser.add_argument("--repetitions", type=int, default=REPETITIONS)
    parser.add_argument("--figure", type=Path, default=Path("docs/strategies.png"))
    options = parser.parse_args()
    if options.what == "race":
        for line in report_races(options.repetitions):
            print(line, flush=True)
        return
    table = read_table(options.detector, options.folder)
    if options.what == "model":
        print("\n".join(report_model(table)))
        return
    budgets = [table.seconds * trainings for trainings in (12, 20, 30, 45, 65, 100, 150)]
    curves = regret_curves(table, budgets, options.repetitions)
    print("\n".join(report_replay(table, budgets, curves)))
    draw_curves(budgets, curves, options.figure)


if __name__ == "__main__":
    main()
