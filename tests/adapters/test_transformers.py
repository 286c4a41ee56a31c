"""Losses in Hugging Face's DETR family: tiny models with random weights, the library's own loss
beside ours."""

import copy
from pathlib import Path

import pytest
import torch
from transformers import (
    DeformableDetrConfig,
    DeformableDetrForObjectDetection,
    Deimv2Config,
    Deimv2ForObjectDetection,
    DetrConfig,
    DetrForObjectDetection,
    DFineConfig,
    DFineForObjectDetection,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    ResNetConfig,
    RTDetrConfig,
    RTDetrForObjectDetection,
    RTDetrResNetConfig,
    SwinConfig,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.loss.loss_for_object_detection import ImageLoss

from cse_autoloss.adapters.transformers import detr_loss

CLASSES = 3


def backbone(kind: type, *stages: str) -> object:
    sizes = dict(embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1])
    return kind(**sizes, layer_type="basic", out_features=list(stages))


DETR = dict(
    encoder_layers=1,
    decoder_layers=2,
    num_queries=12,
    encoder_attention_heads=2,
    decoder_attention_heads=2,
    encoder_ffn_dim=16,
    decoder_ffn_dim=16,
    use_timm_backbone=False,
    num_labels=CLASSES,
)


def detr(**options: object) -> DetrForObjectDetection:
    config = dict(d_model=16, backbone_config=backbone(ResNetConfig, "stage4"))
    return DetrForObjectDetection(DetrConfig(**DETR, **config, **options))


def deformable_detr(**options: object) -> DeformableDetrForObjectDetection:
    # 32 channels: its group normalisation has 32 groups
    config = dict(d_model=32, backbone_config=backbone(ResNetConfig, "stage3", "stage4"))
    return DeformableDetrForObjectDetection(
        DeformableDetrConfig(**DETR, **config, num_feature_levels=2, **options)
    )


RT = dict(
    encoder_hidden_dim=16,
    encoder_in_channels=[8, 16, 16],
    encoder_ffn_dim=16,
    encoder_attention_heads=2,
    decoder_in_channels=[16, 16, 16],
    decoder_ffn_dim=16,
    decoder_attention_heads=2,
    d_model=16,
    num_queries=12,
    decoder_layers=2,
    num_denoising=4,
    num_labels=CLASSES,
)


def rt_detr(**options: object) -> RTDetrForObjectDetection:
    stages = backbone(RTDetrResNetConfig, "stage2", "stage3", "stage4")
    return RTDetrForObjectDetection(RTDetrConfig(**RT, backbone_config=stages, **options))


def d_fine(**options: object) -> DFineForObjectDetection:
    stages = backbone(RTDetrResNetConfig, "stage2", "stage3", "stage4")
    return DFineForObjectDetection(DFineConfig(**RT, backbone_config=stages, **options))


def deim(**options: object) -> Deimv2ForObjectDetection:
    stages = backbone(RTDetrResNetConfig, "stage2", "stage3", "stage4")
    return Deimv2ForObjectDetection(Deimv2Config(**RT, backbone_config=stages, **options))


MODELS = {
    "detr": detr,
    "deformable": deformable_detr,
    "rt_detr": rt_detr,
    "d_fine": d_fine,
    "deim": deim,
}


def batch() -> dict[str, object]:
    """Two images of 64 x 96 pixels; one object in the first, two in the second."""
    generator = torch.Generator().manual_seed(1)
    return {
        "pixel_values": torch.randn(2, 3, 64, 96, generator=generator),
        "labels": [
            {
                "class_labels": torch.tensor([1]),
                "boxes": torch.tensor([[0.5, 0.4, 0.3, 0.5]]),
                "size": torch.tensor([64, 96]),
            },
            {
                "class_labels": torch.tensor([0, 2]),
                "boxes": torch.tensor([[0.3, 0.3, 0.2, 0.2], [0.6, 0.7, 0.4, 0.3]]),
                "size": torch.tensor([64, 96]),
            },
        ],
    }


def step(model: torch.nn.Module) -> object:
    torch.manual_seed(3)  # of the denoising queries
    return model(**batch())


# A positive's target is its IoU, or a power of it; weights let no gradient through. Labels weigh
# 1/4 in a one-stage loss, others 3/4.
VARIFOCAL = (
    "Neg(Add(Mul(4,Mul(Q,Add(Mul(Q,Log(Sig(X))),Mul(Sub(PY,Q),Log(Sub(1,Sig(X))))))),"
    "Mul(NY,Mul(Detach(Square(Sig(X))),Log(Sub(1,Sig(X)))))))"
)
MAL = (
    "Neg(Add(Mul(4,Add(Mul(Square(Q),Log(Sig(X))),Mul(Sub(PY,Square(Q)),Log(Sub(1,Sig(X)))))),"
    "Mul(Div(4,3),Mul(NY,Mul(Detach(Square(Sig(X))),Log(Sub(1,Sig(X))))))))"
)


@pytest.mark.parametrize("auxiliary", [True, False])
@pytest.mark.parametrize(
    ("name", "cls", "reg"),
    [
        ("detr", "CrossEntropy", "GIoU"),
        ("deformable", "Focal", "GIoU"),
        ("rt_detr", VARIFOCAL, "GIoU"),
        # of new ones the first boxes touch the objects' edges: there GIoU's gradient is anyone's
        ("d_fine", VARIFOCAL, None),
        ("deim", MAL, None),
    ],
)
def test_the_default_losses_written_as_expressions_are_the_librarys_own(
    name: str, cls: str, reg: str | None, auxiliary: bool
) -> None:
    torch.manual_seed(0)
    model = MODELS[name](auxiliary_loss=auxiliary).eval()
    theirs = step(model)
    space = "one_stage_cls_plus" if "Detach" in cls else None
    model.loss_function = detr_loss(model, cls=cls, reg=reg, cls_space=space)
    ours = step(model)
    assert ours.loss_dict.keys() == theirs.loss_dict.keys()
    for key, value in theirs.loss_dict.items():
        torch.testing.assert_close(ours.loss_dict[key], value, rtol=1e-5, atol=1e-6)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    mine, own = (
        torch.autograd.grad(loss, parameters, allow_unused=True)
        for loss in (ours.loss, theirs.loss)
    )
    assert [gradient is None for gradient in mine] == [gradient is None for gradient in own]
    one, other = (
        torch.cat([gradient.flatten() for gradient in gradients if gradient is not None])
        for gradients in (mine, own)
    )
    assert (one - other).norm() < 1e-5 * other.norm()


@pytest.mark.parametrize("name", MODELS)
def test_without_losses_of_its_own_it_is_the_librarys_function(name: str) -> None:
    torch.manual_seed(0)
    model = MODELS[name]().train()
    theirs = step(model)
    model.loss_function = detr_loss(model)
    torch.testing.assert_close(step(model).loss, theirs.loss)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_trains_with_searched_losses(name: str) -> None:
    torch.manual_seed(0)
    model = MODELS[name]().train()
    found = "CSE-Autoloss-A" if name == "detr" else "CSE-Autoloss-B"
    model.loss_function = detr_loss(model, cls=found, reg=found)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(30):
        loss = step(model).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(map(torch.isfinite, torch.tensor(losses)))
    assert sum(losses[-5:]) < sum(losses[:5])


def test_boxes_reach_a_loss_in_pixels_of_each_image() -> None:
    """CSE-Autoloss-A's box loss has a constant beside an area: it is not free of scale."""
    torch.manual_seed(0)
    model = detr().eval()
    model.loss_function = detr_loss(model, reg="CSE-Autoloss-A")
    with_sizes = step(model).loss_dict["loss_giou"]
    small = batch()
    for label in small["labels"]:
        del label["size"]
    model.loss_function = detr_loss(model, reg="CSE-Autoloss-A", image_size=(64, 96))
    torch.testing.assert_close(model(**small).loss_dict["loss_giou"], with_sizes)
    model.loss_function = detr_loss(model, reg="CSE-Autoloss-A", image_size=(6, 9))
    assert not torch.isclose(model(**small).loss_dict["loss_giou"], with_sizes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_boxes_in_half_precision_are_compared_in_float32(dtype: torch.dtype) -> None:
    """In half precision, as under autocast, corners and targets would move by pixels."""
    target = torch.tensor([[0.703, 0.807, 0.02, 0.03], [0.313, 0.624, 0.015, 0.02]])
    moved = target + torch.tensor([[0.002, 0, 0, 0], [0, 0.002, 0.001, 0]])
    outputs = {"pred_boxes": moved.to(dtype)[None], "logits": torch.zeros(1, 2, 4, dtype=dtype)}
    labels = [
        {"boxes": target, "class_labels": torch.tensor([0, 1]), "size": torch.tensor([800, 1200])}
    ]
    searched = detr_loss(detr(), reg="GIoU").criterion
    matched = [(torch.arange(2), torch.arange(2))]
    whole = {**outputs, "pred_boxes": outputs["pred_boxes"].float()}
    own, theirs = (
        criterion(None, 3, 0.1, ["boxes"]).get_loss("boxes", given, labels, matched, 2.0)
        for criterion, given in ((searched, outputs), (ImageLoss, whole))
    )
    torch.testing.assert_close(own["loss_giou"], theirs["loss_giou"], rtol=1e-5, atol=1e-5)


def test_a_model_is_copied_and_saved_with_its_losses(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = detr().eval()
    model.loss_function = detr_loss(model, cls="Focal")
    model.loss_function = detr_loss(model, cls="CSE-Autoloss-A", reg="IoU", reg_weight=3)
    torch.save(model, tmp_path / "model.pth")
    # a whole model, that the line above has written
    loaded = torch.load(tmp_path / "model.pth", weights_only=False)
    for other in (loaded, copy.deepcopy(model)):
        torch.testing.assert_close(step(other).loss_dict, step(model).loss_dict)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(
        ValueError, match="cls_space: one_stage_cls is written for one_stage inputs"
    ):
        detr_loss(detr(), cls="Focal", cls_space="one_stage_cls")
    with pytest.raises(
        ValueError, match="reg_space: two_stage_cls is written for two_stage inputs"
    ):
        detr_loss(detr(), reg="CrossEntropy", reg_space="two_stage_cls")
    with pytest.raises(ValueError, match="cls: this loss needs class_frequency, .* not hand over"):
        detr_loss(detr(), cls="ClassBalanced", cls_space="two_stage_cls_plus")
    with pytest.raises(ValueError, match="reg: this loss needs image_sizes, .* not hand over"):
        detr_loss(detr(), reg="MPDIoU", reg_space="reg_plus_image")
    text = T5ForConditionalGeneration(
        T5Config(d_model=8, num_layers=1, num_heads=1, vocab_size=9, d_ff=8)
    )
    with pytest.raises(
        ValueError, match="model: T5ForConditionalGeneration has no loss of the DETR family"
    ):
        detr_loss(text, cls="Focal")


def grounding_dino() -> GroundingDinoForObjectDetection:
    text = dict(model_type="bert", hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    images = SwinConfig(
        image_size=64,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=4,
        out_indices=[2, 3, 4],
    )
    few = {
        name: value
        for name, value in DETR.items()
        if name not in ("use_timm_backbone", "num_labels")
    }
    config = dict(d_model=32, num_feature_levels=3, max_text_len=16, **{**few, "num_queries": 6})
    text |= dict(intermediate_size=16, vocab_size=2000)
    return GroundingDinoForObjectDetection(
        GroundingDinoConfig(backbone_config=images, text_config=text, **config)
    )


def test_a_model_that_tells_objects_by_words_keeps_its_classification_loss() -> None:
    torch.manual_seed(0)
    model = grounding_dino().eval()
    words = torch.tensor([[101, 1037, 1012, 1038, 1012, 1039, 1012, 102]] * 2)
    images = {**batch(), "input_ids": words, "attention_mask": torch.ones_like(words)}
    theirs = model(**images).loss_dict
    model.loss_function = detr_loss(model, reg="GIoU")
    ours = model(**images).loss_dict
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="cls: GroundingDinoForObjectDetection tells objects by"):
        detr_loss(model, cls="Focal")
