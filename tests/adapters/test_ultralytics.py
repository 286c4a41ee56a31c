"""Losses in Ultralytics' detectors: a small one with random weights, the library's own loss beside
ours."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip(
    "ultralytics.utils.loss",
    reason="ultralytics is not installed, or not with a torchvision for this torch",
    exc_type=(ImportError, RuntimeError),
)
from ultralytics.cfg import get_cfg
from ultralytics.nn.tasks import ClassificationModel, DetectionModel, OBBModel

from cse_autoloss.adapters.ultralytics import criterion, use_losses

TOWARDS_SCORE = "Neg(Add(Mul(Q,Log(Sig(X))),Mul(Sub(1,Q),Log(Sub(1,Sig(X))))))"


def model(name: str = "yolov8n.yaml") -> DetectionModel:
    torch.manual_seed(0)
    detector = DetectionModel(name, nc=3, verbose=False).train()
    detector.args = get_cfg()
    return detector


def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "img": torch.rand(2, 3, 96, 96, generator=generator),
        "batch_idx": torch.tensor([0.0, 1, 1]),
        "cls": torch.tensor([[1.0], [0], [2]]),
        "bboxes": torch.tensor([[0.5, 0.4, 0.3, 0.5], [0.3, 0.3, 0.3, 0.4], [0.6, 0.7, 0.4, 0.3]]),
    }


@pytest.mark.parametrize("name", ["yolov8n.yaml", "yolo26n.yaml"])
def test_cross_entropy_towards_the_score_is_the_librarys_own(name: str) -> None:
    detector = model(name)
    theirs, _ = detector.loss(batch())
    detector.criterion = criterion(detector, cls=TOWARDS_SCORE)
    ours, _ = detector.loss(batch())
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["yolov8n.yaml", "yolo26n.yaml"])
def test_a_detector_trains_with_searched_losses(name: str) -> None:
    detector = model(name)
    callback = use_losses(cls="CSE-Autoloss-B", reg="CSE-Autoloss-B", alpha=0.25)
    callback(SimpleNamespace(model=detector))
    optimizer = torch.optim.AdamW(detector.parameters(), lr=1e-3)
    losses = []
    for _ in range(30):
        loss = detector.loss(batch())[0].sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert torch.isfinite(torch.tensor(losses)).all()
    assert sum(losses[-5:]) < sum(losses[:5])


def test_what_is_validated_has_the_losses_too() -> None:
    trainer = SimpleNamespace(model=model(), ema=SimpleNamespace(ema=model()))
    use_losses(cls=TOWARDS_SCORE, cls_weight=2)(trainer)
    trained, validated = (each.loss(batch())[0] for each in (trainer.model, trainer.ema.ema))
    torch.testing.assert_close(trained, validated)
    own, _ = model().loss(batch())
    torch.testing.assert_close(validated[1], 2 * own[1], rtol=1e-4, atol=1e-5)


def test_a_resumed_training_goes_on_with_the_weights_of_its_two_heads() -> None:
    trainer = SimpleNamespace(model=model("yolo26n.yaml"))
    begun = trainer.model.criterion = trainer.model.init_criterion()
    begun.updates = 40
    begun.update()
    use_losses(cls="Focal")(trainer)
    went_on = trainer.model.criterion
    assert (went_on.updates, went_on.o2m, went_on.o2o) == (begun.updates, begun.o2m, begun.o2o)


def test_another_tasks_model_is_refused() -> None:
    with pytest.raises(ValueError, match="a detection model's is v8DetectionLoss"):
        criterion(ClassificationModel("yolov8n-cls.yaml", nc=3, verbose=False), cls="Focal")
    rotated = OBBModel("yolo11n-obb.yaml", nc=3, verbose=False)
    rotated.args = get_cfg()
    with pytest.raises(ValueError, match="reg: OBBModel has a RotatedBboxLoss, of other boxes"):
        criterion(rotated, reg="GIoU")


def test_a_loss_that_needs_more_than_the_library_has_is_refused() -> None:
    with pytest.raises(ValueError, match="reg: this loss needs image_sizes, .* not hand over"):
        criterion(model(), reg="MPDIoU", reg_space="reg_plus_image")
