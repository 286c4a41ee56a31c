"""A run's configuration: what is wrong is said in one line that names the key and what would be
right."""

import pytest
import yaml

from cse_autoloss.config import Config, change_config, parse_config, preset_names, read_config
from cse_autoloss.trial import ConfigError


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_is_valid_and_round_trips(name):
    config = read_config(preset=name)
    assert parse_config(yaml.safe_load(config.to_yaml())) == config


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("serch.x=1", "serch: unknown key; did you mean 'search'?"),
        ("search.poplation=1", "search.poplation: unknown key; did you mean 'population'?"),
        ("search.population=many", "search.population: should be a valid integer, found 'many'"),
        ("search.population=0", "search.population: should be greater than 0, found 0"),
        ("search.population=2.5", "search.population: should be a valid integer"),
        ("search.branch=mask", "search.branch: should be 'cls', 'reg' or 'both', found 'mask'"),
        ("search.spaces.mask=reg", "search.spaces.mask"),
        ("search=3", "search: should be a section of keys, found 3"),
        ("tuning.scales=[[1]]", "tuning.scales.0.1: a value is missing, found [1]"),
        ("tuning.scales=2,1", "tuning.scales: should be a list, found '2,1'"),
        ("others.mine=GIoU", "others.mine: should be a section of keys, found 'GIoU'"),
        ("others.mine.rge=IoU", "others.mine.rge"),
        ("others.mine={}", "others.mine: "),
        ("stages.tiny.btach=8", "stages.tiny.btach: unknown key; did you mean 'batch'?"),
        (
            "stages.tiny.task=box",
            "stages.tiny.task: should be 'tiny', 'head' or 'full', found 'box'",
        ),
        ("stages.tiny.keep=9", "stages.tiny: the best 'keep' of each 'batch' go on"),
        ("stages.full.keep=5", "stages.full: 'batch' and 'keep' belong to the search's stages"),
        ("stages.tiny.seeds=2", "stages.tiny.seeds: 1 before the search's last stage"),
        ("stages={}", "stages: first the search's, then those with 'best'"),
        (
            "stages={final: {best: 1}, full: {}}",
            "stages: first the search's, then those with 'best'",
        ),
        ("stages={full: {}}", "stages: first the search's, then those with 'best'"),
        ("stages.tune.best=1", "stages: names are single words other than 'tune'"),
        ("cluster.num_gpus=2", "cluster.num_gpus: should be less than or equal to 1, found 2"),
        ("search.mutation=0.9", "search.mutation: mutation and crossover are shares"),
        ("seed", "--set seed: expected KEY=VALUE"),
        ("seed.x.y=1", "--set seed.x.y=1: seed is no section"),
        ("seed=[", "--set seed=[: no YAML value: while parsing"),
        ("search={known: 1, known: 2}", "--set search={known: 1, known: 2}: no YAML value: line 1"),
        (".".join("x" * 100) + "=1", "--set x.x.x"),
        ("cluster.workers=1000000000", "cluster.workers: should be less than or equal to 10000"),
        ("search.offspring=1000000000000", "search.offspring: should be less than or equal to"),
        (
            "stages.confirm.seeds=1001",
            "stages.confirm.seeds: should be less than or equal to 1000, found 1001",
        ),
        ("budget.minutes=.inf", "budget.minutes: should be a finite number"),
        (".=1", "--set .=1: expected KEY=VALUE"),
        ("search..known=1", "--set search..known=1: expected KEY=VALUE"),
        ("seed=9999999999", "seed: should be less than or equal to"),
        ("tuning.scales=[[1, 1], [2, 1], [1.0, 1]]", "tuning.scales: [1, 1] stands twice"),
        ("tuning.lr_scales=[2, 2.0]", "tuning.lr_scales: [2] stands twice"),
        ('others={"a\\nb": {reg: IoU}}', "others.a\\nb: should be one line of"),
        ('others={"\\e[2J": {reg: IoU}}', "others.\\x1b[2J: should be one line of"),
    ],
)
def test_a_wrong_setting_is_one_clear_line(setting, message):
    with pytest.raises(ConfigError) as caught:
        read_config(
            preset=None if setting.startswith("stages") else "quickstart", settings=[setting]
        )
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("search.population=9", "what may change is in budget, stages, others, cluster"),
        ("stages.tiny.keep=1", "--set stages.tiny.keep: a run goes on with what it began with"),
        ("stages.confirm.task=tiny", "--set stages.confirm.task: .*'best' and 'seeds' may change"),
        ("stages.final.share=0.5", "--set stages.final.share: .*such as --set stages.whole"),
        ('stages.final.splits=["val"]', "--set stages.final.splits: a run goes on"),
        ("stages.extra.best=1", None),
        ("stages.confirm.seeds=5", None),
    ],
)
def test_a_run_is_resumed_with_what_makes_its_trainings_comparable(setting, message):
    config = read_config()
    if message is None:
        assert change_config(config, [setting]) != config
        return
    with pytest.raises(ConfigError, match=message):
        change_config(config, [setting])


def test_settings_override_a_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("search: {population: 7}\nbudget: {trials: 5}\n")
    config = read_config(path, settings=["search.population=50", "detector.steps=10"])
    assert (config.search.population, config.budget.trials, config.detector) == (
        50,
        5,
        {"steps": 10},
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "not YAML"),
        ("- 1", "expected sections"),
        ("\x00", "not YAML"),
        ("search: {population: }", "search.population"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused(tmp_path, text, message):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_config(path)


def test_a_missing_file_or_preset_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        read_config(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="no preset 'quick'; presets are .*quickstart"):
        read_config(preset="quick")


def test_defaults_are_a_whole_configuration():
    assert parse_config({}) == Config()


def test_processes_of_a_trial_do_not_share_a_gpu():
    with pytest.raises(
        ConfigError, match=r"cluster.num_gpus: .* a GPU each, or none; 1 or 0, found 0.5"
    ):
        parse_config({"cluster": {"processes": 2, "num_gpus": 0.5}})
