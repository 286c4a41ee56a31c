"""What all proxies share: images of 128 pixels, a schedule that trains on one CPU core in half a
minute, the warm-up.

AdamW on one cycle learns in hundreds of steps what SGD needs thousands for.
"""

from detectors.configs import mmdet_config

_base_ = [
    mmdet_config("_base_/datasets/coco_detection.py"),
    mmdet_config("_base_/schedules/schedule_1x.py"),
    mmdet_config("_base_/default_runtime.py"),
]

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
            dict(type="ImageToTensor", keys=["img"]),
            dict(type="Collect", keys=["img"]),
        ],
    ),
]
data = dict(
    samples_per_gpu=4,
    workers_per_gpu=0,
    train=dict(pipeline=train_pipeline),
    val=dict(pipeline=test_pipeline),
    test=dict(pipeline=test_pipeline),
)

optimizer = dict(_delete_=True, type="AdamW", lr=1.5e-3, weight_decay=0.05, fused=True)
optimizer_config = dict(_delete_=True, grad_clip=dict(max_norm=10, norm_type=2))
lr_config = dict(_delete_=True, policy="OneCycle", max_lr=1.5e-3, pct_start=0.2)
runner = dict(_delete_=True, type="IterBasedRunner", max_iters=250)

custom_imports = dict(imports=["detectors"], allow_failed_imports=False)

# What a trial of a search is beyond a training; read by detectors.training. The warm-up stands in
# for ImageNet weights: backbone, neck, any RPN and a dense head's towers are trained once with the
# default losses, nothing frozen. A trial starts from them with new last layers, or R-CNN heads, and
# like all of mmdet's configs keeps the backbone's first stage and batch statistics as they are.
proxy = dict(
    warmup=dict(
        steps=800,
        cfg_options={
            "model.backbone.frozen_stages": -1,
            "model.backbone.norm_eval": False,
            "data.samples_per_gpu": 8,
            "optimizer.lr": 3e-3,
            "lr_config.max_lr": 3e-3,
        },
    ),
    tiny_steps=50,
)
