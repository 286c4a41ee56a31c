"""The proxy of Faster R-CNN: mmdet's, made small enough for half a minute on one CPU core.

ResNet-18 at a quarter of its width, FPN of 32 channels on strides 4 to 32, 48 RoIs an image.
RoIAlign dominates a tiny detector's step on a CPU: 5 x 5 bins of one sample each instead of 7 x 7
of adaptively many.
"""

from detectors.configs import mmdet_config

_base_ = ["./_proxy.py", mmdet_config("_base_/models/faster_rcnn_r50_fpn.py")]

model = dict(
    backbone=dict(depth=18, base_channels=16, stem_channels=16, init_cfg=None),
    neck=dict(in_channels=[16, 32, 64, 128], out_channels=32, num_outs=4),
    rpn_head=dict(
        in_channels=32,
        feat_channels=32,
        anchor_generator=dict(scales=[2.5, 3.5], ratios=[1.0], strides=[4, 8, 16, 32]),
    ),
    roi_head=dict(
        bbox_roi_extractor=dict(
            roi_layer=dict(output_size=5, sampling_ratio=1), out_channels=32, finest_scale=28
        ),
        bbox_head=dict(
            type="IoUAwareShared2FCBBoxHead", in_channels=32, fc_out_channels=256, roi_feat_size=5
        ),
    ),
    train_cfg=dict(
        rpn=dict(sampler=dict(num=64)),
        rpn_proposal=dict(nms_pre=100, max_per_img=100),
        rcnn=dict(sampler=dict(num=48, pos_fraction=0.4)),
    ),
    test_cfg=dict(rpn=dict(nms_pre=100, max_per_img=64), rcnn=dict(max_per_img=50)),
)
