"""Faster R-CNN R101 with CSE-Autoloss-A, COCO 1x. The paper: 40.2 mAP on COCO val."""

from detectors.configs import autoloss_a, mmdet_config

_base_ = mmdet_config("faster_rcnn/faster_rcnn_r101_fpn_1x_coco.py")

model = dict(roi_head=dict(bbox_head=autoloss_a()))
custom_imports = dict(imports=["detectors"], allow_failed_imports=False)
