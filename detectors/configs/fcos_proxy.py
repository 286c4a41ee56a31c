"""The proxy of FCOS: on strides 4 to 32, one convolution of 96 channels in each branch of its
head."""

from detectors.configs import changed, mmdet_config

_base_ = "./_proxy.py"

model = changed(
    mmdet_config("fcos/fcos_center-normbbox-centeronreg-giou_r50_caffe_fpn_gn-head_1x_coco.py"),
    "model",
    dict(
        backbone=dict(
            depth=18,
            base_channels=16,
            stem_channels=16,
            style="pytorch",
            norm_cfg=dict(requires_grad=True),
            init_cfg=None,
        ),
        neck=dict(in_channels=[16, 32, 64, 128], out_channels=32, start_level=0, num_outs=4),
        bbox_head=dict(
            type="IoUAwareFCOSHead",
            in_channels=32,
            feat_channels=96,
            stacked_convs=1,
            strides=[4, 8, 16, 32],
            regress_ranges=((-1, 16), (16, 32), (32, 64), (64, 1e8)),
            norm_cfg=dict(type="GN", num_groups=8, requires_grad=True),
        ),
        test_cfg=dict(nms_pre=200, max_per_img=50),
    ),
)

optimizer = dict(lr=3e-3)
lr_config = dict(max_lr=3e-3)

proxy = dict(head=dict(steps=250))
