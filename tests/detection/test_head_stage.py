"""Heads trained alone on cached features: the same heads, losses and boxes as in the whole
detector."""

import copy
import io

import numpy as np
import pytest
import torch

from cse_autoloss.trial import ConfigError, Trial
from detectors import config_files, configure, head_features, head_stage
from detectors.head_features import precision_of
from detectors.images import average_precision, dataset, surest
from detectors.training import DetectorTrainer

SPLIT = "tiny"  # six images, which both ways of measuring can afford here
ROI = ["faster_rcnn_proxy", "mask_rcnn_proxy"]
DENSE = ["fcos_proxy", "atss_proxy"]
MAPS = ["cascade_rcnn_proxy", *DENSE]


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    """The features here are of trunks that nobody else has."""
    with pytest.MonkeyPatch.context() as patch:
        parent = tmp_path_factory.mktemp("features")
        patch.setattr("detectors.feature_cache.cache_dir", lambda: parent)
        yield parent


@pytest.fixture(scope="module")
def trainers():
    """By config: a trainer whose warm weights nobody has trained; a cache of few images."""
    made = {}

    def trainer(config, cache_bytes=4 << 20, precision="bfloat16", **sampler):
        key = (config, cache_bytes, precision, *sampler.items())
        if key not in made:
            head = dict(steps=12, batch_size=2, cache_bytes=cache_bytes, precision=precision)
            changes = {"proxy.head": head}
            changes |= {f"model.train_cfg.rcnn.sampler.{k}": v for k, v in sampler.items()}
            if config in DENSE:
                changes["model.test_cfg.score_thr"] = 0.0  # an untrained one is sure of nothing
            options = {"config": config, "device": "cpu", "cfg_options": changes}
            buffer = io.BytesIO()
            cold = DetectorTrainer(options, b"")
            weights = cold._model(cold.setup.config, 3).state_dict()
            torch.save({k: v for k, v in weights.items() if not k.startswith("roi_head.")}, buffer)
            made[key] = DetectorTrainer(options, buffer.getvalue())
        return made[key]

    return trainer


def trial(**changes):
    return Trial("key", task="head", **{"evaluate": (SPLIT,), **changes})


@pytest.mark.parametrize("config", ROI + MAPS)
def test_a_head_finds_the_same_boxes_on_cached_features_as_in_the_whole_detector(trainers, config):
    trainer = trainers(config)
    model = trainer._model(trainer.setup.config, 5)
    on_images = [boxes for batch in trainer._detect(model, SPLIT) for boxes in batch]
    stage = trainer._head_stage()
    on_features = [boxes for batch in stage.detect(model, SPLIT) for boxes in batch]
    assert len(on_images) == len(on_features) == 6
    for image, features in zip(on_images, on_features, strict=True):
        scores, others = (np.concatenate(classes)[:, 4] for classes in (image, features))
        assert len(scores) == len(others) > 10
        assert np.sort(others) == pytest.approx(np.sort(scores), abs=2e-3), "half precision"


SEEING = {  # losses that are told of the images what there is to tell
    "cls": ("Neg(Dot(Mul(Y,Mul(Add(R,1),Mul(K,A))),Log(Softmax(X))))", "two_stage_cls_plus"),
    "reg": ("MPDIoU", "reg_plus_image"),
}


@pytest.mark.parametrize("searched", [{}, SEEING], ids=["default", "seeing"])
def test_losses_on_all_cached_rois_are_those_of_mmdets_forward_train(trainers, searched):
    trainer = trainers("faster_rcnn_proxy", precision="float32", num=1000, pos_fraction=1.0)
    config = copy.deepcopy(trainer.setup.config)
    losses = {
        branch: dict(type="SearchedLoss", expression=text, space=space)
        for branch, (text, space) in searched.items()
    }
    configure.set_losses(config.model, losses)
    model = trainer._model(config, 5)
    stage = trainer._head_stage()
    features = stage._features("train")
    flip = 2  # the second image in its third flip: the pipeline's vertical one
    number = len(features.info["chances"]) + flip
    (pipeline, direction, chance) = head_stage._flips(trainer.setup.config.data.train.pipeline)[
        flip
    ]
    data = dataset(trainer.setup, "train", True, pipeline)
    item = data[np.random.default_rng(0).permutation(len(data))[1]]
    meta = item["img_metas"].data
    assert chance == 0.25 and meta["flip_direction"] == direction == "vertical"
    gts, labels = [item["gt_bboxes"].data], [item["gt_labels"].data]
    with torch.no_grad():
        maps = model.eval().extract_feat(item["img"].data[None])
        proposals = model.rpn_head.get_bboxes(
            *model.rpn_head(maps), img_metas=[meta], cfg=model.train_cfg.rpn_proposal
        )
    expected = model.roi_head.forward_train(maps, [meta], proposals, gts, labels)
    losses = features.losses(model, [number])
    assert set(losses) == set(expected) == {"loss_cls", "loss_bbox", "acc"}
    for name in losses:
        assert losses[name].item() == pytest.approx(expected[name].item(), rel=2e-3)


def test_rois_are_drawn_as_mmdets_sampler_draws_them(trainers):
    trainer = trainers("faster_rcnn_proxy")
    features = trainer._head_stage()._features("train")
    torch.manual_seed(0)
    drawn = [features._sample([number])[0] for number in range(len(features.metas))]
    both, places = features._sample([0, 3])
    of_first = torch.cat([both.pos_inds, both.neg_inds]) < features._starts[1]
    assert torch.equal(places == 0, of_first) and set(places.tolist()) == {0, 1}
    for sampled in drawn:
        assert 0 < len(sampled.pos_inds) <= int(48 * 0.4)
        assert len(sampled.pos_inds) + len(sampled.neg_inds) <= 48
        assert set(sampled.pos_gt_labels.tolist()) <= set(range(6))
    assert any(len(sampled.bboxes) == 48 for sampled in drawn)


@pytest.mark.parametrize("config", [*ROI, *MAPS])
def test_losses_that_see_the_images_learn_on_cached_features(trainers, config):
    losses, spaces = ({branch: of[i] for branch, of in SEEING.items()} for i in (0, 1))
    if config in DENSE:
        losses["cls"] = "Neg(Mul(Add(K,A),Add(Mul(PY,Log(Sig(X))),Mul(NY,Log(Sub(1,Sig(X)))))))"
        spaces["cls"] = "one_stage_cls_plus"
    result = trainers(config).train(trial(losses=losses, spaces=spaces, evaluate=()))
    assert result.failure is None and result.steps == 12


@pytest.mark.parametrize(
    ("config", "losses"),
    [
        *((config, {}) for config in ROI + MAPS),
        *((config, dict.fromkeys(("cls", "reg"), "CSE-Autoloss-A")) for config in ROI + MAPS[:1]),
        ("atss_proxy", dict.fromkeys(("cls", "reg"), "CSE-Autoloss-B")),
    ],
    ids=lambda value: value if isinstance(value, str) else "released" if value else "default",
)
def test_a_head_alone_learns_and_leaves_the_trunk_as_it_is(trainers, config, losses):
    trainer = trainers(config)
    result = trainer.train(trial(losses=losses, evaluate=(), lr_scale=0.3))
    assert result.failure is None and result.steps == 12
    values = [loss for _, loss in result.curve]
    assert sum(values[-4:]) < sum(values[:4])
    trained = trainer._head_stage().trainable(trainer._model(trainer.setup.config, 0))
    assert not [name for name, _ in trained.named_parameters() if not name.startswith("head.")]


@pytest.mark.parametrize(("kept", "computed"), [(head_features._KEPT_TARGETS, 2), (1000, 4)])
def test_what_atss_is_to_predict_is_computed_once_an_image(trainers, monkeypatch, kept, computed):
    trainer = trainers("atss_proxy", precision="float32")
    features = trainer._head_stage()._features("train")
    model = trainer._model(trainer.setup.config, 5)
    expected = model.bbox_head.loss(
        *model.bbox_head(features._batch([0, 2])[0]),
        *([of[i] for i in (0, 2)] for of in (features._gt_bboxes, features._gt_labels)),
        [features.metas[i] for i in (0, 2)],
    )
    assign, assigned = model.bbox_head.assigner.assign, []
    monkeypatch.setattr(
        model.bbox_head.assigner, "assign", lambda *args: assigned.append(args) or assign(*args)
    )
    monkeypatch.setattr(features, "_targets", head_features._Targets(kept))
    for images in ([0, 2], [2, 0]):
        losses = features.losses(model, images)
        for name, levels in expected.items():
            assert sum(losses[name]).item() == pytest.approx(sum(levels).item(), rel=1e-5)
    assert len(assigned) == computed
    assert "_get_target_single" not in vars(model.bbox_head), "mmdet's own again"


def repeated(data):
    data.train = [dict(type="RepeatDataset", times=3, dataset=data.train)]
    del data.val


def mixed(data):
    own, mosaic = data.train.pipeline, dict(type="Mosaic", img_scale=(96, 128))
    inner = {**data.train, "pipeline": own[:3]}
    data.train = dict(type="MultiImageMixDataset", dataset=inner, pipeline=[mosaic, *own[3:]])
    data.val = dict(type="ConcatDataset", datasets=[data.val])


@pytest.mark.parametrize("change", [repeated, mixed])
def test_a_head_is_trained_and_measured_on_the_images_of_the_data_set_in_lists_and_wrappers(
    trainers, tmp_path, monkeypatch, change
):
    expected = trainers("faster_rcnn_proxy").train(trial())
    config = config_files.read_config("faster_rcnn_proxy")
    change(config.data)
    (tmp_path / "theirs.py").write_text(config.pretty_text)
    monkeypatch.setattr("detectors.feature_cache.cache_dir", lambda: tmp_path)
    result = trainers(str(tmp_path / "theirs.py")).train(trial())
    assert (result.curve, result.metrics) == (expected.curve, expected.metrics)


def test_the_same_seed_gives_the_same_numbers_and_another_seed_others(trainers):
    trainer = trainers("faster_rcnn_proxy")
    first, again, other = (trainer.train(trial(seed=seed)).curve for seed in (0, 0, 1))
    assert first == again != other


def test_a_share_of_a_trial_takes_that_share_of_its_tasks_steps(trainers):
    trainer = trainers("faster_rcnn_proxy")
    assert trainer.train(trial(evaluate=(), share=0.9)).steps == 11
    with pytest.raises(ValueError, match="share should be above 0 and at most 1, found 0"):
        Trial("key", share=0)
    with pytest.raises(ValueError, match="task should be one of tiny, head, full, found 'heads'"):
        Trial("key", task="heads")


def test_a_cache_holds_the_images_that_it_has_room_for(trainers):
    few, fewer = (trainers("faster_rcnn_proxy", cache_bytes=n << 20) for n in (4, 1))
    held = [trainer._head_stage()._features("train") for trainer in (few, fewer)]
    images = [features.info["images"] for features in held]
    assert images[0] > images[1] and images[0] < 20
    size = held[0]._features.numel() * held[0]._features.element_size()
    assert size < (4 << 20) * 1.5
    with pytest.raises(ConfigError, match=f"cache_bytes: features of {images[1]} images fit"):
        fewer._head_stage().batches(100, seed=0)


def test_a_head_is_measured_on_each_image_as_it_is_and_in_each_flip_of_training(trainers):
    trainer = trainers("faster_rcnn_proxy")
    metrics = trainer.train(trial()).metrics
    views = [metrics[f"{SPLIT}/mAP {view}"] for view in ("as is", "horizontal", "vertical")]
    assert metrics[f"{SPLIT}/mAP"] == pytest.approx(sum(views) / 3)
    directions = [meta["flip_direction"] for meta in trainer._head_stage()._features(SPLIT).metas]
    assert directions == [None, "horizontal", "vertical"] * 6


def test_what_a_head_detects_is_told_of_images_as_they_are_the_surest_boxes(trainers, monkeypatch):
    trainer = trainers("fcos_proxy")
    stage, data, found = trainer._head_stage(), trainer._dataset(SPLIT, training=False), {}
    detect = stage.detect

    def watched(model, split, view):
        found[view] = [boxes for batch in detect(model, split, view) for boxes in batch]
        yield found[view]

    monkeypatch.setattr(stage, "detect", watched)
    told = trainer.train(trial(detections=SPLIT)).detections
    assert len(told) == 6 and told == surest(data, found[0]) != surest(data, found[1])
    objects = sum(len(of["objects"]) for of in told.values())
    scores = sorted((box[4] for image in found[0] for of in image for box in of), reverse=True)
    assert len(scores) > objects > 6
    assert sorted((box[5] for of in told.values() for box in of["found"]), reverse=True) == (
        pytest.approx(scores[:objects], abs=1e-3)
    )


def test_heads_are_measured_as_mmdet_measures():
    data = dataset(DetectorTrainer({"device": "cpu"}, b"").setup, SPLIT, training=False)
    rng = np.random.default_rng(0)
    found = []
    for index in range(len(data)):
        truth = data.get_ann_info(index)
        boxes = truth["bboxes"] + rng.normal(0, 2, truth["bboxes"].shape)
        scored = np.hstack([boxes, rng.random((len(boxes), 1))]).astype(np.float32)
        found.append([scored[truth["labels"] == label] for label in range(len(data.CLASSES))])
    expected = data.evaluate(found, metric="bbox", logger="silent")
    measured = average_precision(data, found)
    assert 0.05 < measured["mAP"] < measured["mAP_50"]
    assert measured == pytest.approx(
        {name: expected[f"bbox_{name}"] for name in measured}, abs=6e-4
    )
    nothing = [[np.zeros((0, 5), np.float32)] * len(data.CLASSES)] * len(data)
    assert average_precision(data, nothing)["mAP"] == 0.0


def test_boxes_found_in_a_flipped_image_are_given_where_they_are_in_the_image():
    def back(direction):
        found = [np.array([[10, 20, 30, 50, 0.9]], np.float32), np.zeros((0, 5), np.float32)]
        return head_stage._as_is(found, dict(ori_shape=(100, 200, 3), flip_direction=direction))

    assert back(None)[0].tolist()[0] == pytest.approx([10, 20, 30, 50, 0.9])
    assert back("horizontal")[0].tolist()[0] == pytest.approx([170, 20, 190, 50, 0.9])
    assert back("vertical")[0].tolist()[0] == pytest.approx([10, 50, 30, 80, 0.9])
    assert back("vertical")[1].shape == (0, 5)


def test_each_image_comes_once_an_epoch_and_flipped_as_often_as_the_pipeline_says():
    batches = head_stage.Batches(100, [0.5, 0.25, 0.25], 10, seed=0)
    epochs = [np.concatenate([next(batches) for _ in range(10)]) for _ in range(20)]
    for epoch in epochs:
        assert sorted(epoch // 3) == list(range(100))
    flips = np.bincount(np.concatenate(epochs) % 3) / 2000
    assert flips == pytest.approx([0.5, 0.25, 0.25], abs=0.04)
    assert list(epochs[0] // 3) != list(epochs[1] // 3)


@pytest.mark.parametrize(
    ("step", "chances"),
    [
        (dict(flip_ratio=0.5), [0.5, 0.5]),
        (dict(flip_ratio=0.6, direction=["horizontal", "vertical"]), [0.4, 0.3, 0.3]),
        (dict(flip_ratio=[0.25, 0.5], direction=["horizontal", "diagonal"]), [0.25, 0.25, 0.5]),
        (dict(flip_ratio=0.0), [1.0]),
        (dict(), [1.0]),
    ],
)
def test_flips_are_told_apart_by_their_chance(step, chances):
    load = dict(type="LoadImageFromFile")
    found = head_stage._flips([load, dict(type="RandomFlip", **step)])
    assert [chance for _, _, chance in found] == pytest.approx(chances)
    assert head_stage._flips([load]) == [([load], None, 1.0)]


def test_without_a_warm_trunk_there_is_no_head_stage():
    trainer = DetectorTrainer({"device": "cpu", "warmup_steps": 0}, b"")
    with pytest.raises(ConfigError, match="detector.warmup_steps: 0, and heads are trained on"):
        trainer.train(trial())


def test_a_wrong_option_of_the_head_stage_is_one_line():
    for changes, message in (
        ({"proxy.head": {"stepz": 5}}, "proxy.head.stepz: unknown key; did you mean .steps."),
        (
            {"proxy.head": {"steps": 3}},
            "proxy.head.steps: should be greater than or equal to 10, found 3",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            DetectorTrainer.check({"cfg_options": changes})


@pytest.mark.parametrize(
    ("knows", "expected"),
    [
        ({"avx2": True, "avx512_bf16": False, "amx_bf16": False}, torch.float32),
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"neon": True, "bf16": True}, torch.bfloat16),
    ],
)
def test_heads_train_in_bfloat16_where_the_cpu_multiplies_it(monkeypatch, knows, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: knows, raising=False)
    assert precision_of("auto", torch.device("cpu")) == expected
    assert precision_of("float32", torch.device("cpu")) == torch.float32
    assert precision_of("bfloat16", torch.device("cpu")) == torch.bfloat16


@pytest.mark.parametrize(
    ("config", "expected"), [("atss_proxy", "bfloat16"), ("cascade_rcnn_proxy", "float32")]
)
def test_a_trial_tells_the_precision_that_its_head_trained_in(trainers, config, expected):
    """A cascade's RoI head is mmdet's own and trains in float32, whatever was asked for."""
    made_from = trainers(config).provenance(Trial("key", task="head"))
    assert made_from["precision"] == expected
    assert "precision" not in trainers(config).provenance(Trial("key"))
