"""A run's configuration: one YAML, validated before anything starts.

The models below are the schema; their docstrings and defaults are the reference. A preset is a YAML
that comes with the package (``cse_autoloss/presets``). ``detector`` belongs to the trainer that it
names and is validated by it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from cse_autoloss.errors import hint
from cse_autoloss.stages import DEFAULT_STAGES, SEEDS, Ladder, Stage
from cse_autoloss.text import printable
from cse_autoloss.trial import BRANCHES, ConfigError
from cse_autoloss.yaml_io import MAX_DEPTH, YamlError, parse_yaml, read_yaml

PRESETS = Path(__file__).parent / "presets"
#: Sections that a run may be resumed with changes in; of the stages, those after the search.
RESUMABLE = ("budget", "stages", "others", "cluster")
Positive = Annotated[int, Field(gt=0, le=1_000_000)]
Share = Annotated[float, Field(ge=0, le=1)]
Seconds = Annotated[float, Field(gt=0, le=1e8)]
Scale = Annotated[float, Field(gt=0, le=1e6)]


def _one_line(text: str) -> str:
    if text != printable(text):
        raise ValueError("should be one line of printable characters")
    return text


Label = Annotated[str, Field(min_length=1, max_length=80), AfterValidator(_one_line)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class SearchSection(Section):
    """What is searched and how.

    Attributes:
        branch: the branch whose loss is searched; ``both`` searches pairs.
        spaces: branch to a search space's name or YAML path; the detector's own where absent.
        from_scratch: leave the known losses out of the first population.
        known: how many known losses are trained first at most; of pairs those that were released
            together, then such as have no loss in common.
        survival: who stays in the population: the ``best``, or the youngest (``age``: regularised
            evolution).
        population: members.
        tournament: members drawn for a tournament; its best becomes a parent.
        mutation, crossover: shares of offspring made by each; the rest is grown at random.
        fitting: share of the candidates that are a leading loss with other numbers and nothing else
            changed, in spaces with real constants: a structure that does well gets its constants.
        strategy: where offspring come from: ``evolution``, ``random`` (all grown from nothing), or
            ``"package.module:Class"`` (see ``strategies/base.py``).
        ranker: in which order survivors train: ``shuffled``, ``model``, or
            ``"package.module:Class"`` (see ``rankers/base.py``).
        ranker_settings: keyword arguments of the ranker.
        earlier: what the ranker begins with: folders of runs of a detector of the same kind, and
            ``lossbench``, what the tabular benchmark has of the same data (the embedded ones).
            Their order is a hint; their mAPs may stand at another level.
        race: settings of ``racing.Race``, which says which losses earn another training at the
            search's last stage, where that has more than one seed: ``share``, ``margin``, ``risk``.
        screened: verify expressions, and simulate them on predictions, before any trains. Without
            it whatever variation makes trains: plain evolution, to compare with.
        offspring: expressions generated a round for each searched branch, before screening; without
            it, as many are as may train.
        candidates: that a round proposes for training; as many as there are workers, if these are
            more. Survivors that are not chosen are kept for later rounds.
        keep_rejected: write down every rejected expression with its reason (a hundred kilobytes for
            each candidate).
        batch_size: candidates screened at a time, which bounds memory; the screener's own default
            where null.
    """

    branch: Literal["cls", "reg", "both"] = "both"
    spaces: dict[Literal["cls", "reg"], str] = {}
    from_scratch: bool = False
    known: Annotated[int, Field(ge=0, le=1_000_000)] = 4
    survival: Literal["best", "age"] = "best"
    population: Positive = 20
    tournament: Positive = 4
    mutation: Share = 0.5
    crossover: Share = 0.3
    fitting: Share = 0.125
    screened: bool = True
    offspring: Annotated[int, Field(gt=0, le=10_000_000)] = 20_000
    strategy: str = "evolution"
    ranker: str = "shuffled"
    ranker_settings: dict[str, Any] = {}
    earlier: list[str] = []
    race: dict[Literal["share", "margin", "risk"], Share] = {}
    candidates: Positive = 8
    keep_rejected: bool = False
    batch_size: Positive | None = None

    @property
    def branches(self) -> tuple[str, ...]:
        return BRANCHES if self.branch == "both" else (self.branch,)


class BudgetSection(Section):
    """When the search stops: at the first of the two.

    Attributes:
        trials: trainings at the search's last stage; with 0 nothing is searched: the default losses
            are tuned, and compared with the released ones and ``others``.
        minutes: of this driver, the stages after the search (as estimated from the trainings that
            ended last) included; null for no limit. However slow the machine, at least one found
            loss is trained, and each loss of the comparison once.
    """

    trials: Annotated[int, Field(ge=0, le=10_000_000)] = 100
    minutes: Seconds | None = None


class TuningSection(Section):
    """How the default loss, which everything is compared with, is tuned on val before the search.

    Attributes:
        scales: loss-weight multiples that are tried, as [cls, reg] pairs.
        lr_scales: learning-rate multiples that are then tried with the best of these.
        seeds: trainings of each, whose mean counts; a single setting takes one. With one, two
            scales that differ by less than seeds do are told apart by luck, and a default that had
            none is easier to beat.
    """

    scales: list[tuple[Scale, Scale]] = Field(
        default=[(1.0, 1.0), (2.0, 1.0), (1.0, 2.0), (2.0, 2.0)], min_length=1
    )
    lr_scales: list[Scale] = []
    seeds: Annotated[int, Field(gt=0, le=SEEDS)] = 1

    @property
    def repeats(self) -> int:
        """Trainings of each setting: one where there is nothing to choose."""
        return self.seeds if len(self.scales) + len(self.lr_scales) > 1 else 1


class ClusterSection(Section):
    """Where trials run.

    Attributes:
        address: of a Ray cluster to join (``auto``, ``host:6379``, ``ray://host:10001``), or null
            to start one here.
        workers: long-lived trial workers, or null for as many as the cluster's CPUs and GPUs hold.
        processes: that share each trial, its images and gradients (torch.distributed).
        num_cpus: of each process.
        num_gpus: of each process: 0 to train on CPUs, 1, or a share of one that several workers use
            together. Processes of one trial cannot share a GPU.
        time_limit: seconds that a trial may take; on a CPU its own, so that a busy machine fails no
            loss. By the clock it may take four times as many.
        retries: how often a trial is run again after a fault of the machine: a worker that died, or
            ran out of memory, or whose GPU failed.
        start_limit: seconds that a worker may take to start and load the data, and that the first
            may wait for room in the cluster.
        prepare_limit: seconds that making what all trials start from (the warm-up) may take.
    """

    address: str | None = None
    workers: Annotated[int, Field(gt=0, le=10_000)] | None = None
    processes: Annotated[int, Field(gt=0, le=1000)] = 1
    num_cpus: Annotated[float, Field(gt=0, le=1000)] = 1
    num_gpus: Share = 0
    time_limit: Seconds = 600
    retries: Annotated[int, Field(ge=0, le=1000)] = 2
    start_limit: Seconds = 600
    prepare_limit: Seconds = 14_400


class Config(Section):
    """A run.

    Attributes:
        seed: of the search, and the one that its trainings' seeds begin with. Those of the first
            stage after the search begin with 1000 more, of the second with 2000 more and so on: the
            comparisons of two runs whose seeds are near each other have seeds in common.
        detector: the trainer and its options: what is trained, on which data, how long.
        stages: the ladder that candidates climb, by name (see ``stages.Stage``).
        others: what else takes part in the comparison: a name for the table, to branch, to a known
            loss's name or an expression. A branch that is left out has the detector's default.
        log: what the run is told to beside its journal (see ``loggers``): ``tensorboard``,
            ``mlflow``, ``package.module:Class``.
    """

    seed: Annotated[int, Field(ge=0, le=2**31)] = 0
    detector: dict[str, Any] = {}
    search: SearchSection = SearchSection()
    budget: BudgetSection = BudgetSection()
    tuning: TuningSection = TuningSection()
    stages: dict[str, Stage] = DEFAULT_STAGES
    others: dict[Label, Annotated[dict[Literal["cls", "reg"], str], Field(min_length=1)]] = {}
    cluster: ClusterSection = ClusterSection()
    log: list[str] = []

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def preset_names() -> list[str]:
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def read_config(
    path: str | Path | None = None, preset: str | None = None, settings: Sequence[str] = ()
) -> Config:
    """Read a preset or a YAML file, then apply ``key.path=value`` settings.

    Raises:
        ConfigError: one line that names the file or key and what would be right.
    """
    if preset is not None:
        path = PRESETS / f"{preset}.yaml"
        if not path.is_file():
            raise ConfigError(
                f"--preset: no preset {preset!r}; presets are {', '.join(preset_names())}"
            )
    data = _read_yaml(Path(path)) if path is not None else {}
    data.setdefault("stages", Config().model_dump(mode="json")["stages"])  # to be changed in part
    for setting in settings:
        _apply(setting, data)
    return parse_config(data)


def change_config(config: Config, settings: Sequence[str]) -> Config:
    """A run's configuration with ``key.path=value`` settings that a run may be resumed with.

    Raises:
        ConfigError: for a setting that would make its new trainings incomparable with those it has;
            or as ``read_config``.
    """
    data = config.model_dump(mode="json")
    for setting in settings:
        if setting.partition(".")[0] not in RESUMABLE:
            raise ConfigError(
                f"--set {setting}: a run goes on with what it began with; what may change is in "
                f"{', '.join(RESUMABLE)}"
            )
        _apply(setting, data)
    changed = parse_config(data)
    searched = Ladder.of(config.stages).search
    for name, stage in config.stages.items():
        fixed = Stage.model_fields if name in searched else ("task", "share", "splits")
        for key in fixed:
            if getattr(changed.stages[name], key) != getattr(stage, key):
                raise ConfigError(
                    f"--set stages.{name}.{key}: a run goes on with what it began with; of the "
                    "stages after the search 'best' and 'seeds' may change, and another may follow "
                    "them, such as --set stages.whole.task=full --set stages.whole.best=2"
                )
    return changed


def parse_config(data: Mapping[str, Any]) -> Config:
    """Validate a configuration's data.

    Raises:
        ConfigError: for the first thing that is wrong.
    """
    try:
        # Strict, but a list is a tuple
        config = Config.model_validate_json(json.dumps(data, default=str))
    except ValidationError as error:
        raise ConfigError(first_line(error, Config)) from None
    for key, tried in (
        ("scales", [f"{cls:g}, {reg:g}" for cls, reg in config.tuning.scales]),
        ("lr_scales", [f"{scale:g}" for scale in config.tuning.lr_scales]),
    ):
        if twice := next((text for text in tried if tried.count(text) > 1), None):
            raise ConfigError(f"tuning.{key}: [{twice}] stands twice")
    Ladder.of(config.stages)
    if config.search.mutation + config.search.crossover > 1:
        raise ConfigError(
            "search.mutation: mutation and crossover are shares of the offspring; together at "
            f"most 1, found {config.search.mutation} + {config.search.crossover}"
        )
    if config.cluster.processes > 1 and 0 < config.cluster.num_gpus < 1:
        raise ConfigError(
            "cluster.num_gpus: processes that train a trial together need a GPU each, or none; 1 "
            f"or 0, found {config.cluster.num_gpus:g}"
        )
    return config


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(
            f"{path}: no such file; give a run's YAML, or --preset with one of "
            f"{', '.join(preset_names())}"
        )
    try:
        data = read_yaml(path)
    except YamlError as error:
        raise ConfigError(str(error)) from None
    if not isinstance(data, dict):
        raise ConfigError(
            f"{path}: expected sections such as 'search:', found {type(data).__name__}"
        )
    return data


def _apply(setting: str, data: dict[str, Any]) -> None:
    key, equals, text = setting.partition("=")
    if not equals or not all(key.split(".")):
        raise ConfigError(f"--set {setting}: expected KEY=VALUE, such as search.population=50")
    *sections, last = key.split(".")
    if len(sections) > MAX_DEPTH:
        raise ConfigError(f"--set {setting[:80]}: no key is {len(sections)} sections deep")
    for section in sections:
        data = data.setdefault(section, {})
        if not isinstance(data, dict):
            raise ConfigError(f"--set {setting}: {section} is no section")
    try:
        data[last] = parse_yaml(text)
    except YamlError as error:
        raise ConfigError(f"--set {setting[:80]}: no YAML value: {error}") from None


def first_line(error: ValidationError, model: type[BaseModel]) -> str:
    """The first of what is wrong with a model's keys: which, what, and what would be right."""
    first = error.errors()[0]
    # Pydantic's mark of a mapping's key
    key = ".".join(str(part) for part in first["loc"] if part != "[key]")
    if first["type"] == "extra_forbidden":
        section: Any = model
        for part in first["loc"][:-1]:
            if part in section.model_fields:  # not a name that the user gave
                section = _section(section.model_fields[part].annotation)
        right = hint(str(first["loc"][-1]), section.model_fields, "keys")
        return f"{printable(key, 100)}: unknown key; {right}"
    return f"{printable(key, 100)}: {_plainly(first['msg'])}, found {first['input']!r}"[:300]


def _plainly(message: str) -> str:
    """What pydantic says of a value, as a user of YAML calls things."""
    for theirs, ours in (
        ("Input should be", "should be"),
        ("Value error, ", ""),
        ("should be an object", "should be a section of keys"),
        ("should be a valid array", "should be a list"),
        ("Field required", "a value is missing"),
    ):
        message = message.replace(theirs, ours)
    return message


def _section(annotation: Any) -> Any:
    return next(
        (
            arg
            for arg in get_args(annotation)
            if isinstance(arg, type) and issubclass(arg, BaseModel)
        ),
        annotation,
    )
