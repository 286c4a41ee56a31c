"""The proxy of Cascade R-CNN: that of Faster R-CNN with mmdet's three stages, each as small as its
one."""

from detectors.configs import changed, mmdet_config

_base_ = "./faster_rcnn_proxy.py"

model = dict(
    type="CascadeRCNN",
    roi_head=dict(
        type="CascadeRoIHead",
        num_stages=3,
        stage_loss_weights=[1, 0.5, 0.25],
        bbox_head=changed(
            mmdet_config("_base_/models/cascade_rcnn_r50_fpn.py"),
            "model.roi_head.bbox_head",
            dict(
                type="IoUAwareShared2FCBBoxHead",
                in_channels=32,
                fc_out_channels=256,
                roi_feat_size=5,
            ),
        ),
    ),
    train_cfg=dict(
        rcnn=changed(
            mmdet_config("_base_/models/cascade_rcnn_r50_fpn.py"),
            "model.train_cfg.rcnn",
            dict(sampler=dict(num=48, pos_fraction=0.4)),
        )
    ),
)

proxy = dict(head=dict(steps=250))
