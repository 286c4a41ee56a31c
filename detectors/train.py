"""Training a detector with any losses, as mmdet's own ``tools/train.py`` does it, in one process or
in many.

What differs from mmdet's script: losses by name or expression, data sets by name, processes on
CPUs, the start of a proxy from the weights that a search's trials start from, and that what is
wrong is said before anything starts.
"""

from __future__ import annotations

import os
import runpy
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from mmcv import Config
from mmcv.runner import get_dist_info
from mmdet.apis import init_random_seed, set_random_seed, train_detector
from mmdet.datasets import CocoDataset, build_dataset
from mmdet.models import build_detector
from mmdet.utils import (
    collect_env,
    get_device,
    get_root_logger,
    replace_cfg_vals,
    setup_multi_processes,
    update_data_root,
)
from torch import distributed

from cse_autoloss.errors import UserError
from cse_autoloss.files import write_whole
from cse_autoloss.space import load_space
from cse_autoloss.trial import ConfigError
from detectors import config_data, config_files, configure, datasets
from detectors.datasets.named import unwrapped
from detectors.training import DetectorTrainer

DEFAULT = "default"  # names the loss that a detector has without any search
_SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Training:
    """What is to be trained.

    Attributes:
        config: a name in ``detectors/configs`` or the path of an mmdet config.
        losses: branch to an expression, a known loss's name, or ``default``; an absent branch keeps
            the config's loss.
        data: a data set's name (:mod:`detectors.datasets.dataset`); where None, what a proxy's
            trials train on (:func:`detectors.config_data.usual_data`), else the config's own data
            as it is.
        cfg_options: changes of the config, dotted key to value, made last.
        work_dir: where logs and checkpoints go; ``work_dirs/CONFIG`` where None.
        resume_from: a checkpoint to go on from, with its optimiser and step.
        seed: of weights, the order of images, their augmentation and the sampling of boxes.
        launcher: ``none``, or ``pytorch`` for the processes that torchrun has started.
        validate: measure on the val split as the config's ``evaluation`` says.
    """

    config: str
    losses: Mapping[str, str] = field(default_factory=dict)
    data: str | None = None
    cfg_options: Mapping[str, Any] = field(default_factory=dict)
    work_dir: Path | None = None
    resume_from: Path | None = None
    seed: int = 0
    launcher: str = "none"
    validate: bool = True


def train(training: Training) -> Path:
    """Train; write logs, checkpoints and the config to the work folder.

    Returns:
        The work folder.

    Raises:
        ConfigError: one line, before anything is trained or written, for what is wrong with config,
            losses or data.
    """
    config = read(training)
    setup_multi_processes(config)
    torch.backends.cudnn.benchmark = config.get("cudnn_benchmark", False)
    # Before there are other processes, which have no part in it
    _start_as_trials_do(training, config)
    joined = join_processes(training.launcher)
    config.gpu_ids = range(get_dist_info()[1]) if joined else [0]
    config.device = get_device()
    try:
        seed = init_random_seed(training.seed, config.device)
        set_random_seed(seed)
        model, dataset = _build(training, config)
        if joined:
            distributed.barrier()  # until the first process has written what all start from
        work_dir = Path(config.work_dir)
        work_dir.mkdir(parents=True, exist_ok=True)
        config.pop("proxy", None)
        config.seed = seed
        config.dump(str(work_dir / f"{Path(training.config).stem}.py"))
        timestamp = time.strftime("%Y%m%d_%H%M%S")
        logger = get_root_logger(str(work_dir / f"{timestamp}.log"), config.log_level)
        environment = "\n".join(f"{key}: {value}" for key, value in collect_env().items())
        logger.info(
            f"Environment info:\n{environment}\nDistributed training: "
            f"{joined}\nConfig:\n{config.pretty_text}"
        )
        if config.checkpoint_config is not None:
            config.checkpoint_config.meta = dict(CLASSES=dataset.CLASSES)
        train_detector(
            model,
            [dataset],
            config,
            distributed=joined,
            validate=training.validate,
            timestamp=timestamp,
            meta=dict(
                env_info=environment,
                config=config.pretty_text,
                seed=seed,
                exp_name=Path(training.config).name,
            ),
        )
    finally:
        if joined:
            distributed.destroy_process_group()
    return work_dir


def read(training: Training) -> Config:
    """The config that will be trained: losses and data in their places, then the user's own
    changes.

    Raises:
        ConfigError: one line for what is wrong.
    """
    config = config_files.read_config(training.config, "CONFIG")
    _set_losses(config, training.losses)
    usual = config_data.usual_data(config) if config.get("proxy") else "config"
    data = training.data or (usual if usual != "config" else None)  # that is mmdet's to read
    first = os.environ.get("RANK", "0") == "0"  # one process looks at the images for all
    if data:
        masks = config_data.has_masks(config.model)
        found = datasets.find(data, config=config, masks=masks, open_images=first)
        if first:
            for finding in found.findings:
                print(finding.line, file=sys.stderr)
        config_data.set_data(config, found)
    elif "train" not in (config.get("data") or {}):
        raise ConfigError(f"{training.config} has no data.train to train on")
    config_files.change(config, training.cfg_options, "--cfg-options")
    config = replace_cfg_vals(config)
    update_data_root(config)
    _check_files(config, training)
    if first:
        print(_told(config, found.name if data else None), file=sys.stderr)
    if config.get("proxy"):
        if "max_iters" not in config.get("runner", {}):
            raise ConfigError(
                f"{training.config} inherits a proxy, which is counted in steps, and has no "
                "runner.max_iters; give runner=dict(type='IterBasedRunner', max_iters=...)"
            )
        _set_intervals(config, training.cfg_options)
    if training.resume_from:
        if not training.resume_from.is_file():
            raise ConfigError(f"--resume-from: {training.resume_from}: no such checkpoint")
        config.resume_from = str(training.resume_from)
    config.work_dir = str(
        training.work_dir or config.get("work_dir") or Path("work_dirs", Path(training.config).stem)
    )
    return config


def join_processes(launcher: str) -> bool:
    """Join the processes that torchrun has started, each with a GPU of its own, or all on CPUs
    where there is no GPU.

    Returns:
        Whether there are any to join.

    Raises:
        ConfigError: torchrun has not started this process, or this process has no GPU.
    """
    if launcher == "none":
        return False
    if not {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"} <= os.environ.keys():
        raise ConfigError(
            "--launcher pytorch: this process was not started by torchrun; use "
            "scripts/dist_train.sh CONFIG N"
        )
    if torch.cuda.is_available():
        local = int(os.environ["LOCAL_RANK"])
        if local >= torch.cuda.device_count():
            raise ConfigError(
                f"--launcher pytorch: {torch.cuda.device_count()} GPUs here, and none for process "
                f"{local}"
            )
        torch.cuda.set_device(local)
    distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    return True


def _set_losses(config: Config, losses: Mapping[str, str]) -> None:
    weights = configure.searched_weights(config.model)
    searched = {}
    for branch, text in losses.items():
        if text == DEFAULT:
            _set_default(config, branch)
            continue
        space = configure.space(config.model, branch)
        try:
            load_space(space).expression(text)
        except UserError as error:
            raise ConfigError(f"--loss-{branch}: {error}") from None
        searched[branch] = dict(
            type="SearchedLoss", expression=text, space=space, loss_weight=weights[branch]
        )
    if searched:
        configure.set_losses(config.model, searched)
        config_files.add_import(config, "detectors")


def _set_default(config: Config, branch: str) -> None:
    """In place of a searched loss the one that the config would have inherited."""
    key = configure.LOSS_KEYS[branch]

    def searched(heads: list[dict[str, Any]]) -> bool:
        return any(head.get(key, {}).get("type") == "SearchedLoss" for head in heads)

    heads = configure.box_heads(config.model)
    if not searched(heads):
        return
    for inherited in _inherited(Path(config.filename)):
        own = configure.box_heads(inherited.model)
        if not searched(own):
            for head, other in zip(heads, own, strict=True):
                head[key] = other[key]
                if branch == "reg":
                    head["reg_decoded_bbox"] = other.get("reg_decoded_bbox", False)
            return
    raise ConfigError(
        f"--loss-{branch} default: {config.filename} holds a searched loss and inherits no other; "
        "give the config that it was made from"
    )


def _inherited(path: Path) -> Iterator[Config]:
    """The configs with a model that a config's file inherits, nearest first. Such files are
    programs: it is run."""
    bases = runpy.run_path(str(path)).get("_base_", [])
    for base in [bases] if isinstance(bases, str) else bases:
        base = path.parent / base
        config = Config.fromfile(str(base))
        if "model" in config:
            yield config
            yield from _inherited(base)


def _check_files(config: Config, training: Training) -> None:
    for split in _SPLITS[: 1 + training.validate]:
        if split not in config.data:
            raise ConfigError(
                f"{training.config} has no data.{split}"
                + ("; --no-validate trains without" if split == "val" else "")
            )
        for part in unwrapped(config.data[split]):
            names = part.get("ann_file") or []
            for name in [names] if isinstance(names, str) else names:
                path = Path(part.get("data_root") or "", name)
                if not path.is_file():
                    raise ConfigError(
                        f"{path}: no such file (data.{split}.ann_file); give --data embedded or "
                        "--data /path"
                    )


def _told(config: Config, name: str | None) -> str:
    """A line that says what is trained on; of the config's own data the annotations' file."""
    part = next(unwrapped(config.data.train), {})
    counts = (head.get("num_classes") for head in configure.box_heads(config.model))
    count = next((f": {count} classes" for count in counts if count is not None), "")
    return f"training on {name or part.get('ann_file') or part.get('type')}{count}"


def _check_classes(config: Config, dataset: Any, name: str) -> None:
    """mmdet's own check is made by runners that count epochs alone."""
    classes = dataset.CLASSES
    for head in configure.box_heads(config.model):
        count = head.get("num_classes")
        if classes and count is not None and count != len(classes):
            raise ConfigError(
                f"{name}: {head['type']} has num_classes={count}, and data.train has "
                f"{len(classes)} classes: "
                f"{', '.join(list(classes)[:5])}{', ...' if len(classes) > 5 else ''}"
            )


def _set_intervals(config: Config, given: Mapping[str, Any]) -> None:
    """A proxy's schedule is a few hundred steps: five measurements, the last after the last step,
    where not set."""
    steps = config.runner.max_iters
    every = next(steps // parts for parts in (5, 4, 3, 2, 1) if steps % parts == 0)
    intervals = {"evaluation": every, "checkpoint_config": every, "log_config": max(1, steps // 50)}
    for section, interval in intervals.items():
        if f"{section}.interval" not in given:
            config[section].interval = interval


def _build(training: Training, config: Config) -> tuple[torch.nn.Module, CocoDataset]:
    try:
        model = build_detector(
            config.model, train_cfg=config.get("train_cfg"), test_cfg=config.get("test_cfg")
        )
        model.init_weights()
        dataset = build_dataset(config.data.train)
    except Exception as error:  # a config can name anything: what comes of it is the config's
        raise ConfigError(f"{training.config}: {config_files.reason(error)}") from error
    if len(dataset) == 0:
        raise ConfigError(
            f"{training.config}: data.train has no image to train on, with an object and of 32 "
            "pixels at least"
        )
    _check_classes(config, dataset, training.config)
    model.CLASSES = dataset.CLASSES
    return model, dataset


def _start_as_trials_do(training: Training, config: Config) -> None:
    """Where a config has a ``proxy.warmup``, start from its weights, as every trial of a search
    does.

    The first process makes them, or finds them in the user's cache; a ``load_from`` or
    ``resume_from`` goes before.
    """
    if (
        not (config.get("proxy") or {}).get("warmup", {}).get("steps")
        or config.get("load_from")
        or config.get("resume_from")
    ):
        return
    config.load_from = str(Path(config.work_dir, "start.pth"))
    if os.environ.get("RANK", "0") == "0":
        shape = {
            key: value
            for key, value in training.cfg_options.items()
            if key.startswith(("model.", "proxy."))
        }
        prepared = DetectorTrainer.prepare(
            {"config": training.config, "data": training.data, "cfg_options": shape}
        )
        write_whole(Path(config.load_from), prepared)
