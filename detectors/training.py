"""A trial in, mAP out: an mmdet detector trained with one choice of losses, in one process.

Everything that learns or measures is mmdet's and mmcv's: the detector, its data pipelines,
optimiser and schedule hooks, and the COCO evaluation. Here stands what a trial is: from which
weights it starts, how strong its losses are, when it is given up.
"""

from __future__ import annotations

import copy
import io
import logging
import math
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import cv2
import numpy as np
import torch
from mmcv import Config
from mmcv.parallel import MMDataParallel, MMDistributedDataParallel
from mmcv.runner import IterBasedRunner, build_optimizer, build_runner, get_dist_info
from mmcv.runner.iter_based_runner import IterLoader
from mmdet.apis import set_random_seed
from mmdet.apis import train as mmdet_train
from mmdet.datasets import CocoDataset, build_dataloader
from mmdet.models import build_detector
from torch import distributed, nn
from torch.utils.data import DataLoader

from cse_autoloss.cache import digest
from cse_autoloss.files import write_whole
from cse_autoloss.trial import BRANCHES, ConfigError, Found, Picture, Trial, TrialResult
from detectors import config_files, configure, export, mmdet3
from detectors.check import check_trains, check_trial
from detectors.head_stage import HeadStage
from detectors.images import average_precision, dataset, loader, pictures, quiet, surest
from detectors.setup import Options, Setup, absolute, read_config, versions
from detectors.watch import GivenUp, Watch, mean_of_processes, stopwatch

_METRICS = ("mAP", "mAP_50", "mAP_75", "mAP_s", "mAP_m", "mAP_l")
_COLD = (
    "detector.warmup_steps: 0, and heads are trained on what a warm trunk sees; give its steps, as "
    "--set detector.warmup_steps=1500, or stages that train whole detectors"
)
_FIXED_SEED = 0  # of the warm-up, and of the heads and the batch that loss weights are found on
# Of the warm-up's weights, what trials do not start from: R-CNN heads, and the layer of a dense
# head that puts out class logits. A new regression layer's boxes would overlap nothing: a
# classification loss that weighs positives by their IoU would not see one, and with one seed of
# five never learn.
_LOGITS = re.compile(r"bbox_head\.\w+_cls\.")
# Prefix of that layer's weights, which are kept for measuring losses on alone.
_MEASURED_ON = "measured_on."
_MEASURED_AT_ONCE = 8  # images
# Metric to value, and for each image, for each class, (boxes, 5) of x1 y1 x2 y2 and score.
_Measured = tuple[dict[str, float], list[list[np.ndarray]]]
# mmcv's runner wants a logger; a trial tells by its result
_SILENT = logging.getLogger("detectors.silent")
_SILENT.setLevel(logging.CRITICAL)
_SILENT.propagate = False


class DetectorTrainer:
    """Trains mmdet detectors for a search; see :class:`cse_autoloss.trial.Trainer`.

    Attributes:
        setup: options, config and data of its trials.
    """

    targets = ("mmdet2", "mmdet3")

    @staticmethod
    def resolve(options: Mapping[str, Any]) -> dict[str, Any]:
        return absolute(options)

    @staticmethod
    def describe(options: Mapping[str, Any]) -> str:
        known = Options.model_validate(dict(options))
        return f"{known.config} on {known.data}" if known.data else known.config

    @staticmethod
    def versions() -> dict[str, str]:
        used = versions()
        return {name: used[name] for name in ("mmdet", "mmcv-full", "pycocotools")}

    @staticmethod
    def snippet(expression: str, space: str, loss_weight: float = 1.0) -> str:
        return export.snippet(expression, space, loss_weight)

    @staticmethod
    def spaces(options: Mapping[str, Any]) -> dict[str, str]:
        return configure.spaces(read_config(options).model)

    @staticmethod
    def check(options: Mapping[str, Any]) -> dict[str, Any]:
        setup = Setup(options, open_images=True)
        check_trial(setup)
        handed = configure.hands(setup.config.model)
        return {
            "refused": configure.refused(setup.config.model),
            "hands": {
                branch: {head: sorted({*names, "class_frequency"}) for head, names in heads.items()}
                for branch, heads in handed.items()
            },
            "classes": list(setup.data.classes),
            "images": {name: split.images for name, split in setup.data.splits.items()},
            "notes": [finding.line for finding in setup.data.findings],
            "digests": {"data": setup.data.digest, "detector": setup.config_digest},
            "untrainable": {} if setup.warmup_steps else {"head": _COLD},
        }

    @staticmethod
    def pictures(
        options: Mapping[str, Any], split: str, images: Sequence[str]
    ) -> dict[str, Picture]:
        return pictures(Setup(options), split, images)

    @staticmethod
    def adopt(options: Mapping[str, Any], say: Callable[[str], None]) -> dict[str, Any]:
        from detectors.proxy import adopt  # which trains by this class

        return adopt(options, say)

    @staticmethod
    def prepare(options: Mapping[str, Any]) -> bytes:
        """What trials start from, after a training with the default losses, or nothing if
        ``warmup_steps`` is 0.

        Backbone, neck, RPN, and a one-stage head but for its layer of class logits. That layer
        stands beside them; no trial starts from it: the strength of losses is measured on it.

        Kept in the user's cache under a digest of all that they come from: options, config, data,
        code, versions.
        """
        setup = Setup(options)
        if setup.warmup_steps == 0:
            return b""
        path = setup.warmup_path()
        if not path.is_file():
            worker = DetectorTrainer(options, b"")
            config, steps = setup.warmup_config(), setup.warmup_steps
            model = worker._model(config, _FIXED_SEED)
            worker._train_detector(model, config, "train", steps, _FIXED_SEED, Watch(steps))
            weights = {name: value.cpu() for name, value in model.state_dict().items()}
            kept = {
                _MEASURED_ON + name if _LOGITS.match(name) else name: value
                for name, value in weights.items()
                if not name.startswith("roi_head.")
            }
            buffer = io.BytesIO()
            torch.save(kept, buffer)
            write_whole(path, buffer.getvalue())
        return path.read_bytes()

    @staticmethod
    def export(
        options: Mapping[str, Any],
        found: Found,
        base: str | None = None,
        target: str = "mmdet2",
        name: str = "found",
        check: bool = True,
    ) -> dict[str, str]:
        losses = export.searched_losses(found, lambda: Setup(options).data.class_frequency)
        if target == "mmdet3":
            run = config_files.read_config(options.get("config", Options().config))
            return {f"{name}.py": mmdet3.config_text(base, run, losses, found)}
        if base is not None:
            text = export.user_config(config_files.read_config(base, "--config"), losses, found)
        else:
            setup = Setup(options)
            text = export.proxy_config(setup.config, setup.data, found)
        if check:
            check_trains(Config.fromstring(text, ".py"), base or setup.options.config)
        return {f"{name}.py": text}

    def __init__(self, options: Mapping[str, Any], prepared: bytes) -> None:
        self.setup = Setup(options)
        self._processes = get_dist_info()[1]
        images = self.setup.config.data.samples_per_gpu
        if images % self._processes:
            raise ConfigError(
                f"detector.batch_size: {images} images cannot be shared evenly by "
                f"{self._processes} processes"
            )
        self._device = self.setup.device
        if self._device.type == "cuda" and not torch.cuda.is_available():
            raise ConfigError(
                "detector.device: cuda, and this worker has no GPU; cluster.num_gpus=1 gives it one"
            )
        if self._device.type == "cpu":
            # A worker is a core: more workers beat more threads at this size
            torch.set_num_threads(1)
            cv2.setNumThreads(0)
        self._warm = (
            torch.load(io.BytesIO(prepared), map_location="cpu", weights_only=True)
            if prepared
            else {}
        )
        self._prepared_digest = digest(prepared)
        self._datasets: dict[tuple[str, bool], CocoDataset] = {}
        self._default_norms: dict[str, float] | None = None
        self._stage: HeadStage | None = None

    def train(
        self, trial: Trial, progress: Callable[[int, int], None] | None = None
    ) -> TrialResult:
        if trial.task == "head":
            self._head_stage().load(("train", *trial.evaluate))
        started = time.monotonic()
        steps = self.setup.steps_of(trial.task, trial.share)
        evaluated = ("tiny",) if trial.task == "tiny" else trial.evaluate
        watch = Watch(steps, progress, trial.time_limit, stopwatch(self.setup.device.type))
        try:
            config, weights = self._with_losses(trial)
            model = self._model(config, trial.seed)
            if trial.task == "head":
                self._train_head(model, config, steps, trial.seed, watch, trial.lr_scale)
            else:
                split = "tiny" if trial.task == "tiny" else "train"
                self._train_detector(model, config, split, steps, trial.seed, watch, trial.lr_scale)
            measure = self._measure_head if trial.task == "head" else self._measure_detector
            metrics, detections = {}, {}
            for name in evaluated:
                values, found = measure(model, name, watch)
                metrics |= {f"{name}/{key}": value for key, value in values.items()}
                if name == trial.detections:
                    detections = surest(self._dataset(name, training=False), found)
        except GivenUp as reason:
            return TrialResult.failed(trial, str(reason), time.monotonic() - started)
        return TrialResult(
            key=trial.key,
            mAP=metrics[f"{evaluated[0]}/mAP"] if evaluated else None,
            metrics=metrics,
            curve=tuple(watch.curve),
            loss_weights=weights,
            seconds=time.monotonic() - started,
            steps=steps,
            provenance=self.provenance(trial),
            detections=detections,
        )

    def provenance(self, trial: Trial) -> dict[str, Any]:
        """What a trial's numbers depend on beside its losses: versions, digests, seed, device."""
        precision = {}
        if trial.task == "head":
            precision["precision"] = str(self._head_stage().precision).removeprefix("torch.")
        return {
            **versions(),
            **precision,
            "config": self.setup.options.config,
            "config_digest": self.setup.config_digest,
            "data": self.setup.data.name,
            "data_digest": self.setup.data.digest,
            "weights_digest": self._prepared_digest,
            "batch_size": self.setup.config.data.samples_per_gpu,
            "processes": self._processes,
            "seed": trial.seed,
            "device": torch.cuda.get_device_name()
            if self._device.type == "cuda"
            else f"cpu ({platform.processor()})",
            "host": platform.node(),
        }

    def _with_losses(self, trial: Trial) -> tuple[Config, dict[str, float]]:
        """The config with the trial's losses, each at its weight; and branch to weight."""
        config = copy.deepcopy(self.setup.config)
        default = configure.heads(config.model)[0]
        weights = {
            branch: default[configure.LOSS_KEYS[branch]].get("loss_weight", 1.0)
            * trial.scale.get(branch, 1.0)
            for branch in configure.spaces(config.model)
        }
        spaces = {**configure.spaces(config.model), **trial.spaces}
        searched = {
            branch: {"type": "SearchedLoss", "expression": expression, "space": spaces[branch]}
            for branch, expression in trial.losses.items()
        }
        configure.give_frequencies(searched, lambda: self.setup.data.class_frequency)
        if searched:
            if self._default_norms is None:
                self._default_norms = self._gradient_norms(config)
            try:
                configure.set_losses(config.model, searched)
            except ConfigError as error:  # of one formula: others may do
                raise GivenUp(str(error)) from None
            norms = self._gradient_norms(config)
            for branch in searched:
                if not 0 < norms[branch] < math.inf:
                    raise GivenUp(
                        f"gradient norm {norms[branch]} of the {branch} loss before the first step"
                    )
                weights[branch] = (
                    trial.scale.get(branch, 1.0) * self._default_norms[branch] / norms[branch]
                )
        configure.set_loss_weights(config.model, weights)
        return config, weights

    def _gradient_norms(self, config: Config) -> dict[str, float]:
        """Branch to the mean L2 norm of its loss's gradient in a prediction (a RoI's or a
        location's).

        On one batch of the train split, from the warm weights and heads that are the same for every
        trial. The gradient is taken in what the heads put out, logits and encoded boxes: there a
        loss on decoded boxes and one on deltas can be compared. A new dense head would not do: its
        boxes are far from everything, and a classification loss that weighs a positive by its IoU
        next to nothing there. Its layer of logits has its warm weights, too.
        """
        model = self._model(config, _FIXED_SEED, warm_head=True).train()
        batch = next(iter(self._loader(config, "train", _FIXED_SEED)))
        predictions: dict[str, list[torch.Tensor]] = {branch: [] for branch in BRANCHES}

        def keep(_head: nn.Module, _inputs: Any, outputs: tuple[Any, ...]) -> None:
            for branch, output in zip(BRANCHES, outputs, strict=False):
                predictions[branch] += output if isinstance(output, (list, tuple)) else [output]

        for head in _heads(model):
            head.register_forward_hook(keep)
        losses = self._parallel(model)(return_loss=True, **batch)
        norms = {}
        for branch in configure.spaces(config.model):
            key = configure.LOSS_KEYS[branch]
            values = [value for name, value in losses.items() if name.split(".")[-1] == key]
            total = sum(
                part.sum()
                for value in values
                for part in (value if isinstance(value, list) else [value])
            )
            gradients = torch.autograd.grad(
                total, predictions[branch], retain_graph=True, allow_unused=True
            )
            gradients = [gradient for gradient in gradients if gradient is not None]
            rows = sum(
                prediction.numel() // prediction.shape[1] for prediction in predictions[branch]
            )
            norm = sum(gradient.norm(dim=1).sum().item() for gradient in gradients) / rows
            # Where a loss is undefined its gradient may still be finite: the first step would tell.
            norms[branch] = mean_of_processes(norm if torch.isfinite(total) else math.nan)
        return norms

    def _model(self, config: Config, seed: int, warm_head: bool = False) -> nn.Module:
        """A detector with the warm weights, those of a dense head's logits if asked; all else
        made from the seed."""
        set_random_seed(seed)
        model = build_detector(config.model)
        with quiet():
            model.init_weights()
        weights = {
            name: value for name, value in self._warm.items() if not name.startswith(_MEASURED_ON)
        }
        if warm_head:
            weights = {name.removeprefix(_MEASURED_ON): value for name, value in self._warm.items()}
        left = model.load_state_dict(weights, strict=False)
        assert not left.unexpected_keys, left.unexpected_keys
        model.CLASSES = self.setup.data.classes
        return model.to(self._device)

    def _train_detector(
        self,
        model: nn.Module,
        config: Config,
        split: str,
        steps: int,
        seed: int,
        watch: Watch,
        lr_scale: float = 1.0,
    ) -> None:
        set_random_seed(seed)
        batches = IterLoader(self._loader(config, split, seed))
        self._fit(self._together(model), config, batches, steps, seed, watch, lr_scale)

    def _train_head(
        self,
        model: nn.Module,
        config: Config,
        steps: int,
        seed: int,
        watch: Watch,
        lr_scale: float,
    ) -> None:
        options, stage = self.setup.head, self._head_stage()
        batches = stage.batches(options.batch_size, seed)
        self._fit(
            stage.trainable(model), config, batches, steps, seed, watch, lr_scale * options.lr
        )

    def _fit(
        self,
        model: nn.Module,
        config: Config,
        batches: Any,
        steps: int,
        seed: int,
        watch: Watch,
        lr_scale: float = 1.0,
    ) -> None:
        """Train the model in place, by mmcv's runner and its hooks, one step at a time under the
        watch's eyes.

        Args:
            model: with mmcv's ``train_step``.
            batches: as mmcv's ``IterLoader``: what ``next`` gives, ``train_step`` takes.
        """
        config = copy.deepcopy(config)
        config.runner.max_iters = steps
        config_files.scale_learning_rate(config, lr_scale)
        set_random_seed(seed)
        optimizer = build_optimizer(model, config.optimizer)
        runner: IterBasedRunner = build_runner(
            config.runner, dict(model=model, optimizer=optimizer, logger=_SILENT)
        )
        runner.register_lr_hook(config.lr_config)
        runner.register_optimizer_hook(config.optimizer_config)
        model.train()
        runner.call_hook("before_run")
        runner.call_hook("before_epoch")
        while runner.iter < steps:
            runner.train(batches)
            watch.step(runner.iter, runner.outputs["log_vars"]["loss"], _gradient_norm(runner))
            runner.log_buffer.clear()

    def _measure_head(self, model: nn.Module, split: str, watch: Watch) -> _Measured:
        """The mean over images as they are and in each flip: more images to tell heads apart by.
        And the boxes in images as they are."""
        stage, views, seen = self._head_stage(), {}, {}
        data = self._dataset(split, training=False)
        for number, view in enumerate(stage.views):
            found = []
            for boxes in stage.detect(model, split, number):
                watch.check_time()
                found += boxes
            views[view], seen[view] = average_precision(data, found), found
        means = {
            name: statistics.fmean(metrics[name] for metrics in views.values())
            for name in views["as is"]
        }
        means |= {f"mAP {view}": metrics["mAP"] for view, metrics in views.items()}
        return means, seen["as is"]

    @torch.no_grad()
    def _detect(self, model: nn.Module, split: str) -> Iterator[list[list[np.ndarray]]]:
        """Boxes found in the images of a split, a batch at a time; the share of this process where
        there are several."""
        model.eval()
        parallel = self._parallel(model)
        loader = build_dataloader(
            *(self._dataset(split, training=False), _MEASURED_AT_ONCE, 0),
            dist=self._processes > 1,
            shuffle=False,
        )
        for batch in loader:
            found = parallel(return_loss=False, rescale=True, **batch)
            yield [boxes[0] if isinstance(boxes, tuple) else boxes for boxes in found]  # and masks

    def _measure_detector(self, model: nn.Module, split: str, watch: Watch) -> _Measured:
        """COCO AP on a split: metric to value in [0, 1]; sizes of which the split has no object are
        absent. And the boxes."""
        results = []
        for boxes in self._detect(model, split):
            watch.check_time()
            results += boxes
        dataset = self._dataset(split, training=False)
        if len(results) < len(dataset):
            # images were dealt in turn, and some twice where they could not be dealt evenly
            parts: list[Any] = [None] * self._processes
            distributed.all_gather_object(parts, results)
            results = [result for turn in zip(*parts, strict=True) for result in turn]
        results = results[: len(dataset)]
        with quiet():
            values = dataset.evaluate(results, metric="bbox", logger="silent")
        # Without a single detection mmdet returns nothing at all, and the AP is 0.
        metrics = {name: float(values.get(f"bbox_{name}", 0.0)) for name in _METRICS}
        return {name: value for name, value in metrics.items() if value >= 0}, results

    def _loader(self, config: Config, split: str, seed: int) -> DataLoader:
        return loader(self._dataset(split, training=True), config, seed, self._processes)

    def _dataset(self, split: str, training: bool) -> CocoDataset:
        if (split, training) not in self._datasets:
            self._datasets[split, training] = dataset(self.setup, split, training)
        return self._datasets[split, training]

    def _head_stage(self) -> HeadStage:
        if self._stage is None:
            if not self._warm:
                raise ConfigError(_COLD)
            trunk = self._model(copy.deepcopy(self.setup.config), _FIXED_SEED)
            self._stage = HeadStage(self.setup, trunk, self._prepared_digest)
        return self._stage

    def _together(self, model: nn.Module) -> MMDataParallel | MMDistributedDataParallel:
        """The model for a training in all processes of the trial, which share its images and
        average its gradients."""
        if self._processes == 1:
            return self._parallel(model)
        return mmdet_train.build_ddp(
            model, self._device.type, device_ids=[0], broadcast_buffers=False
        )

    def _parallel(self, model: nn.Module) -> MMDataParallel:
        if self._device.type == "cpu":
            return _OnCpu(model)
        return MMDataParallel(model, device_ids=[0])


class _OnCpu(MMDataParallel):  # type: ignore[misc]
    """A model that stays on the CPU where there is a GPU, too: torch's own ``DataParallel`` takes
    every GPU that it sees, and moves the model to it if there is one."""

    def __init__(self, model: nn.Module) -> None:
        nn.Module.__init__(self)
        self.module, self.dim, self.device_ids = model, 0, []


def _gradient_norm(runner: IterBasedRunner) -> float:
    """Of the last step's gradient, which is what a loss breaks first; the one that mmcv's hook took
    to clip by, if it clips."""
    if taken := runner.log_buffer.val_history.get("grad_norm"):
        return taken[-1]
    trained = [p for p in runner.model.parameters() if p.grad is not None]
    return float(nn.utils.clip_grad_norm_(trained, math.inf))  # clips nothing, returns the norm


def _heads(model: nn.Module) -> list[nn.Module]:
    found = model.roi_head.bbox_head if hasattr(model, "roi_head") else model.bbox_head
    return list(found) if isinstance(found, nn.ModuleList) else [found]
