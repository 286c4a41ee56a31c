"""The proxy of Mask R-CNN: that of Faster R-CNN, and a mask head of two convolutions on 7 x 7
bins."""

from detectors.configs import changed, mmdet_config

_base_ = "./faster_rcnn_proxy.py"

model = dict(
    type="MaskRCNN",
    roi_head=dict(
        mask_roi_extractor=changed(
            mmdet_config("_base_/models/mask_rcnn_r50_fpn.py"),
            "model.roi_head.mask_roi_extractor",
            dict(roi_layer=dict(output_size=7, sampling_ratio=1), out_channels=32, finest_scale=28),
        ),
        mask_head=changed(
            mmdet_config("_base_/models/mask_rcnn_r50_fpn.py"),
            "model.roi_head.mask_head",
            dict(num_convs=2, in_channels=32, conv_out_channels=32),
        ),
    ),
    train_cfg=dict(rcnn=dict(mask_size=14)),
    test_cfg=dict(rcnn=dict(mask_thr_binary=0.5)),
)

train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(type="Resize", img_scale=(128, 128), keep_ratio=True),
    dict(type="RandomFlip", flip_ratio=[0.25, 0.25], direction=["horizontal", "vertical"]),
    dict(
        type="Normalize", mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True
    ),
    dict(type="Pad", size_divisor=32),
    dict(type="DefaultFormatBundle"),
    dict(type="Collect", keys=["img", "gt_bboxes", "gt_labels", "gt_masks"]),
]
data = dict(train=dict(pipeline=train_pipeline))
