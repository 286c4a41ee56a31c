"""The proxy: mmdet's Faster R-CNN, made small enough to train on one CPU core in half a minute.

ResNet-18 at a quarter of its width, FPN of 32 channels on strides 4 to 32, images of 128 pixels, 48 RoIs an image.
RoIAlign dominates a tiny detector's step on a CPU: 5 x 5 bins of one sample each instead of 7 x 7 of adaptively many.
AdamW on one cycle learns in hundreds of steps what SGD needs thousands for.
"""
from detectors.configs import mmdet_config

_base_ = mmdet_config("faster_rcnn/faster_rcnn_r50_fpn_1x_coco.py")

norm_cfg = dict(type="BN", requires_grad=True)
model = dict(
    backbone=dict(
        depth=18, base_channels=16, stem_channels=16, frozen_stages=-1, norm_eval=False, norm_cfg=norm_cfg, init_cfg=None
    ),
    neck=dict(in_channels=[16, 32, 64, 128], out_channels=32, num_outs=4),
    rpn_head=dict(
        in_channels=32,
        feat_channels=32,
        anchor_generator=dict(scales=[2.5, 3.5], ratios=[1.0], strides=[4, 8, 16, 32]),
    ),
    roi_head=dict(
        bbox_roi_extractor=dict(roi_layer=dict(output_size=5, sampling_ratio=1), out_channels=32, finest_scale=28),
        bbox_head=dict(type="IoUAwareShared2FCBBoxHead", in_channels=32, fc_out_channels=128, roi_feat_size=5),
    ),
    train_cfg=dict(
        rpn=dict(sampler=dict(num=64)),
        rpn_proposal=dict(nms_pre=200, max_per_img=100),
        rcnn=dict(sampler=dict(num=48)),
    ),
    test_cfg=dict(rpn=dict(nms_pre=200, max_per_img=64), rcnn=dict(max_per_img=50)),
)

img_norm_cfg = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True)
image_size = (128, 128)
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="Resize", img_scale=image_size, keep_ratio=True),
    dict(type="RandomFlip", flip_ratio=[0.25, 0.25], direction=["horizontal", "vertical"]),
    dict(type="Normalize", **img_norm_cfg),
    dict(type="Pad", size_divisor=32),
    dict(type="DefaultFormatBundle"),
    dict(type="Collect", keys=["img", "gt_bboxes", "gt_labels"]),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(
        type="MultiScaleFlipAug",
        img_scale=image_size,
        flip=False,
        transforms=[
            dict(type="Resize", keep_ratio=True),
            dict(type="RandomFlip"),
            dict(type="Normalize", **img_norm_cfg),
            dict(type="Pad", size_divisor=32),
            dict(type="DefaultFormatBundle"),  # not ImageToTensor: images are measured in batches
            dict(type="Collect", keys=["img"]),
        ],
    ),
]
data = dict(
    samples_per_gpu=8,
    workers_per_gpu=0,
    train=dict(pipeline=train_pipeline),
    val=dict(pipeline=test_pipeline),
    test=dict(pipeline=test_pipeline),
)

optimizer = dict(_delete_=True, type="AdamW", lr=3e-3, weight_decay=0.05)
optimizer_config = dict(_delete_=True, grad_clip=dict(max_norm=10, norm_type=2))
lr_config = dict(_delete_=True, policy="OneCycle", max_lr=3e-3, pct_start=0.2)
runner = dict(_delete_=True, type="IterBasedRunner", max_iters=250)

# What a trial of a search is, beyond the training above; read by detectors.training.
proxy = dict(warmup_steps=800, verify_steps=50)
custom_imports = dict(imports=["detectors"], allow_failed_imports=False)
