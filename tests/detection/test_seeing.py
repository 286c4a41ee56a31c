"""What heads tell losses of the images: a RoI's or an anchor's IoU before regression, the share of
its image that an object covers, the size of the image. Held against plain computations."""

import functools

import numpy as np
import pytest
import torch
from mmdet.core import BitmapMasks
from mmdet.models import build_detector

from cse_autoloss.config import parse_config
from cse_autoloss.inputs import EXTRAS
from cse_autoloss.run import check
from cse_autoloss.trial import ConfigError, Found
from detectors import config_data, config_files, configure
from detectors.configs import mmdet_config
from detectors.training import DetectorTrainer

OF_ROIS = "Neg(Dot(Mul(Y,Mul(R,Mul(K,A))),Log(Softmax(X))))"
OF_ANCHORS = "Neg(Mul(PY,Mul(R,Mul(K,Mul(A,Log(Sig(X)))))))"
OF_POINTS = "Neg(Mul(PY,Mul(K,Mul(A,Log(Sig(X))))))"
DETECTORS = {
    "faster_rcnn_proxy": OF_ROIS,
    "mask_rcnn_proxy": OF_ROIS,
    "cascade_rcnn_proxy": OF_ROIS,
    "fcos_proxy": OF_POINTS,
    "atss_proxy": OF_ANCHORS,
    "retinanet/retinanet_r50_fpn_1x_coco.py": OF_ANCHORS,
    "gfl/gfl_r50_fpn_1x_coco.py": OF_ANCHORS,
}
# Two images of different sizes; each object has a class of its own, by which a positive is known.
SIZES = [(128, 96), (64, 112)]
BOXES = [[[8, 8, 60, 70], [70, 30, 120, 90]], [[10, 20, 50, 100], [2, 2, 40, 30]]]
LABELS = [[1, 3], [0, 4]]
CLASSES = 5


def of_object(label):
    """Of the object of that class: its image, that image's size, the share of it that it covers."""
    image = next(image for image, labels in enumerate(LABELS) if label in labels)
    (width, height), box = SIZES[image], BOXES[image][LABELS[image].index(label)]
    return image, SIZES[image], (box[2] - box[0]) * (box[3] - box[1]) / (width * height)


def nearest_iou(box, image):
    boxes, box = np.array(BOXES[image], float), np.array(box, float)
    inner = np.minimum(boxes[:, 2:], box[2:]) - np.maximum(boxes[:, :2], box[:2])
    shared = np.clip(inner, 0, None).prod(1)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1) + (box[2:] - box[:2]).prod()
    return (shared / (areas - shared)).max()


@pytest.fixture
def with_r(tmp_path):
    path = tmp_path / "with_r.yaml"
    path.write_text("name: with_r\nbase: one_stage_cls_plus\nvariables: [R]\n")
    return str(path)


def made(name, space):
    """The detector, small, with losses that need all that it hands over."""
    model = config_files.read_config("atss_proxy" if "/" in name else name).model
    if "/" in name:  # another head on the proxy's trunk
        theirs = config_files.read_config(mmdet_config(name)).model
        kept = {key: model.bbox_head[key] for key in ("in_channels", "anchor_generator")}
        model.bbox_head = {**theirs.bbox_head, **kept, "feat_channels": 32, "stacked_convs": 1}
        for key in ("type", "train_cfg", "test_cfg"):
            model[key] = theirs[key]
    config_data.set_num_classes(model, CLASSES)
    space = "two_stage_cls_plus" if "roi_head" in model else space
    losses = {
        "cls": dict(type="SearchedLoss", expression=DETECTORS[name], space=space),
        "reg": dict(type="SearchedLoss", expression="MPDIoU", space="reg_plus_image"),
    }
    configure.set_losses(model, losses)
    torch.manual_seed(0)
    return build_detector(model).train()


def recorded(module, name, calls):
    """Arguments of each call of a module's method, kept in a list."""
    method = getattr(module, name)

    @functools.wraps(method)
    def call(*args, **kwargs):
        calls.append((args, kwargs))
        return method(*args, **kwargs)

    setattr(module, name, call)


@pytest.mark.parametrize("name", DETECTORS)
def test_losses_are_told_of_the_images_what_they_need(name, with_r):
    detector = made(name, with_r)
    outer = getattr(detector, "roi_head", detector)
    heads = outer.bbox_head if hasattr(outer.bbox_head, "__len__") else [outer.bbox_head]
    cls_calls, reg_calls, head_calls = [], [], []
    for head in heads:
        recorded(head.loss_cls, "forward", cls_calls)
        recorded(head.loss_bbox, "forward", reg_calls)
        recorded(head, "loss", head_calls)
    metas = [
        dict(img_shape=(h, w, 3), pad_shape=(128, 128, 3), ori_shape=(h, w, 3), scale_factor=1.0)
        for w, h in SIZES
    ]
    truth = dict(
        gt_bboxes=[torch.tensor(boxes, dtype=torch.float32) for boxes in BOXES],
        gt_labels=[torch.tensor(labels) for labels in LABELS],
    )
    if "mask" in name:
        truth["gt_masks"] = [BitmapMasks(np.ones((2, 128, 128), np.uint8), 128, 128)] * 2
    values = detector.forward_train(torch.randn(2, 3, 128, 128), metas, **truth)
    total = sum(detector._parse_losses(values)[1].values())
    assert np.isfinite(total)

    if hasattr(detector, "roi_head"):
        befores = [args[2][:, 1:] for args, _ in head_calls]
    elif "fcos" not in name:
        grids = [
            (128 // stride[0], 128 // stride[1]) for stride in heads[0].prior_generator.strides
        ]
        befores = [
            level.repeat(2, 1)
            for level in heads[0].prior_generator.grid_priors(grids, device="cpu")
        ]
    positives = []
    for number, ((_, target, *_), given) in enumerate(cls_calls):
        assert not any(given[extra].requires_grad for extra in given.keys() & EXTRAS.keys())
        positive = (target >= 0) & (target < CLASSES)
        images, _, shares = (
            zip(*map(of_object, target[positive].tolist()), strict=True)
            if positive.any()
            else ((), (), ())
        )
        assert given["image_ids"][positive].tolist() == list(images)
        assert given["pos_areas"].tolist() == pytest.approx(shares, rel=1e-3)
        if "fcos" not in name:
            pairs = zip(befores[number].tolist(), given["image_ids"].tolist(), strict=True)
            expected = [nearest_iou(box, image) for box, image in pairs]
            assert given["roi_ious"].tolist() == pytest.approx(expected, abs=1e-4)
        positives += target[positive].tolist()
    assert set(positives) == {0, 1, 3, 4}
    sizes = torch.cat([given["image_sizes"] for _, given in reg_calls])
    targets = torch.cat([args[1] for args, _ in reg_calls])
    areas = (targets[:, 2:] - targets[:, :2]).prod(1)
    _, expected, shares = zip(*map(of_object, positives), strict=True)
    assert (areas / sizes.prod(1)).tolist() == pytest.approx(shares, rel=1e-3), "in one unit"
    assert (sizes[:, 0] / sizes[:, 1]).tolist() == pytest.approx([w / h for w, h in expected])


def test_a_search_in_a_space_whose_variable_no_head_hands_over_does_not_start(with_r):
    def parsed(config, space):
        detector = {"trainer": "detectors.training:DetectorTrainer", "config": config}
        return parse_config({"detector": detector, "search": {"spaces": {"cls": space}}})

    right = (
        rf"search.spaces.cls: {with_r} has the variable R, which takes roi_ious \(.*\), and this "
        "detector's head IoUAwareFCOSHead does not hand that over; a space without R would do"
    )
    with pytest.raises(ConfigError, match=f"^{right}$"):
        check(parsed("fcos_proxy", with_r))
    assert check(parsed("fcos_proxy", with_r), searched=False)["spaces"]["cls"] == with_r
    checked = check(parsed("atss_proxy", with_r))
    everything = {"image_ids", "pos_areas", "roi_ious", "class_frequency", "pos_ious"}
    assert set(checked["hands"]["cls"]["IoUAwareATSSHead"]) == everything


def test_a_roi_head_that_shows_no_images_says_so_before_anything_is_built():
    model = config_files.read_config("faster_rcnn_proxy").model
    model.roi_head.type = "MaskScoringRoIHead"
    loss = dict(type="SearchedLoss", space="two_stage_cls_plus")
    with pytest.raises(ConfigError, match="cls loss needs pos_areas, .* does not hand over"):
        configure.set_losses(model, {"cls": {**loss, "expression": "Neg(Dot(Mul(Y,A),X))"}})
    configure.set_losses(model, {"cls": {**loss, "expression": "Neg(Dot(Mul(Y,K),X))"}})
    assert model.roi_head.type == "MaskScoringRoIHead"


def test_a_found_loss_is_exported_with_what_it_needs(tmp_path):
    spaces = {"cls": "two_stage_cls_plus", "reg": "reg"}
    found = Found({"cls": "ClassBalanced"}, spaces, {"cls": 1.0}, {})
    text = DetectorTrainer.export({}, found)["found.py"]
    assert "class_frequency" in text
    with_areas = Found({"cls": OF_ROIS}, spaces, {"cls": 1.0}, {})
    assert "ImageAwareStandardRoIHead" in DetectorTrainer.export({}, with_areas)["found.py"]
    with pytest.raises(ConfigError, match="--target mmdet3: the cls loss needs image_ids"):
        DetectorTrainer.export({}, with_areas, target="mmdet3")
