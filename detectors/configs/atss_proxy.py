"""The proxy of ATSS: on strides 4 to 32, one convolution of 96 channels in each branch of its head.

Anchors of 24 pixels at stride 4: objects this small are told apart by fine features. With 12 it
reaches 0.20 mAP, with 24 0.23.
"""

from detectors.configs import changed, mmdet_config

_base_ = "./_proxy.py"

model = changed(
    mmdet_config("atss/atss_r50_fpn_1x_coco.py"),
    "model",
    dict(
        backbone=dict(depth=18, base_channels=16, stem_channels=16, init_cfg=None),
        neck=dict(in_channels=[16, 32, 64, 128], out_channels=32, start_level=0, num_outs=4),
        bbox_head=dict(
            type="IoUAwareATSSHead",
            in_channels=32,
            feat_channels=96,
            stacked_convs=1,
            anchor_generator=dict(octave_base_scale=6, strides=[4, 8, 16, 32]),
            norm_cfg=dict(type="GN", num_groups=8, requires_grad=True),
        ),
        test_cfg=dict(nms_pre=200, max_per_img=50),
    ),
)

optimizer = dict(lr=3e-3)
lr_config = dict(max_lr=3e-3)

proxy = dict(head=dict(steps=250))
