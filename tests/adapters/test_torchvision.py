"""Losses in torchvision's detectors: small ones with random weights, the library's own loss beside
ours."""

import pytest
import torch

pytest.importorskip(
    "torchvision.models.detection",
    reason="torchvision is not installed, or not for this torch",
    exc_type=(ImportError, RuntimeError),
)
from torchvision.models.detection import (
    FCOS,
    FasterRCNN,
    RetinaNet,
    fcos_resnet50_fpn,
    ssd300_vgg16,
)
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

from cse_autoloss.adapters.torchvision import use_losses

KINDS = {"FCOS": FCOS, "RetinaNet": RetinaNet, "FasterRCNN": FasterRCNN}


def model(kind: str) -> torch.nn.Module:
    torch.manual_seed(0)
    backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None, trainable_layers=5)
    few = {"rpn_post_nms_top_n_train": 64} if kind == "FasterRCNN" else {}
    return KINDS[kind](backbone, num_classes=4, min_size=64, max_size=96, **few).train()


def batch() -> tuple[list[torch.Tensor], list[dict[str, torch.Tensor]]]:
    generator = torch.Generator().manual_seed(1)
    images = [torch.rand(3, 96, 128, generator=generator) for _ in range(2)]
    boxes = [[[10.0, 10, 50, 60]], [[30.0, 20, 90, 80], [5, 50, 45, 90]]]
    labels = [[1], [3, 2]]
    return images, [
        {"boxes": torch.tensor(box), "labels": torch.tensor(label)}
        for box, label in zip(boxes, labels, strict=True)
    ]


def step(detector: torch.nn.Module) -> dict[str, torch.Tensor]:
    torch.manual_seed(2)  # of the samplers
    return detector(*batch())


@pytest.mark.parametrize(
    ("kind", "cls", "reg"),
    [("FCOS", "Focal", "GIoU"), ("RetinaNet", "Focal", None), ("FasterRCNN", "CrossEntropy", None)],
)
def test_the_default_losses_written_as_expressions_are_the_librarys_own(
    kind: str, cls: str, reg: str | None
) -> None:
    detector = model(kind)
    theirs = step(detector)
    # torchvision's focal loss has no mean over locations and classes: alpha is 0.25 in both
    ours = step(use_losses(detector, cls=cls, reg=reg))
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-5, atol=1e-6)


def test_a_call_says_both_losses_and_the_parameters_are_torchvisions() -> None:
    plain, detector = model("FCOS"), use_losses(model("FCOS"), cls="CSE-Autoloss-B")
    changed = step(detector)
    use_losses(detector, reg="GIoU")
    found, own = step(detector), step(plain)
    assert found["classification"] == own["classification"] != changed["classification"]
    plain.load_state_dict(detector.state_dict())


@pytest.mark.parametrize("kind", KINDS)
def test_a_detector_trains_with_searched_losses(kind: str) -> None:
    found = "CSE-Autoloss-A" if kind == "FasterRCNN" else "CSE-Autoloss-B"
    detector = use_losses(model(kind), cls=found, reg=found)
    optimizer = torch.optim.AdamW(detector.parameters(), lr=2e-4)
    losses = []
    for _ in range(30):
        loss = sum(step(detector).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert torch.isfinite(torch.tensor(losses)).all()
    assert sum(losses[-5:]) < sum(losses[:5])
    with torch.no_grad():
        (found, _) = detector.eval()(batch()[0])
    assert found.keys() == {"boxes", "labels", "scores"}


def test_images_without_objects_are_only_background() -> None:
    for kind in KINDS:
        found = "CSE-Autoloss-A" if kind == "FasterRCNN" else "CSE-Autoloss-B"
        detector = use_losses(model(kind), cls=found, reg=found)
        images, _ = batch()
        nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
        losses = detector(images, [nothing, nothing])
        assert all(torch.isfinite(loss) for loss in losses.values()), kind


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_boxes_in_half_precision_are_compared_in_float32(kind: str, dtype: torch.dtype) -> None:
    """As under autocast: float16 holds no area of a large object, bfloat16 none of its corners."""
    found = "CSE-Autoloss-A" if kind == "FasterRCNN" else "CSE-Autoloss-B"
    detector = use_losses(model(kind), cls=found, reg="GIoU")
    places = torch.tensor([[7.0, 5, 907, 703], [100, 100, 200, 200]])
    targets = [{"boxes": torch.tensor([[11.0, 13, 917, 719]]), "labels": torch.tensor([1])}]

    def losses(dtype: torch.dtype) -> list[torch.Tensor]:
        deltas = torch.full((2, 4), 0.5 if kind == "FCOS" else 0.125, dtype=dtype)
        if kind == "FasterRCNN":
            heads, logits = detector.roi_heads, torch.zeros(2, 4, dtype=dtype)
            heads._sampled = [places]
            aims = heads.box_coder.encode_single(targets[0]["boxes"].repeat(2, 1), places)
            return list(heads._losses(logits, deltas.repeat(1, 4), [torch.tensor([1, 0])], [aims]))
        outputs = {
            "cls_logits": torch.zeros(1, 2, 4, dtype=dtype),
            "bbox_regression": deltas[None],
            "bbox_ctrness": torch.zeros(1, 2, 1, dtype=dtype),
        }
        matched = [torch.tensor([0, -1])]
        found = detector.head.compute_loss(targets, outputs, [places], matched)
        return [found["classification"], found["bbox_regression"]]

    torch.testing.assert_close(losses(dtype), losses(torch.float32))


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="model: SSD is none of torchvision's FCOS, RetinaNet"):
        use_losses(ssd300_vgg16(weights=None, weights_backbone=None), cls="Focal")
    with pytest.raises(
        ValueError, match="cls_space: two_stage_cls is written for two_stage inputs"
    ):
        use_losses(
            fcos_resnet50_fpn(weights=None, weights_backbone=None),
            cls="Focal",
            cls_space="two_stage_cls",
        )
    with pytest.raises(ValueError, match="reg: this loss needs image_sizes, .* not hand over"):
        use_losses(model("FCOS"), reg="MPDIoU", reg_space="reg_plus_image")
