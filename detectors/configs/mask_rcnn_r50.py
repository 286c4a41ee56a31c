"""Mask R-CNN R50 with CSE-Autoloss-A on its boxes, COCO 1x. The paper: 39.1 box mAP on COCO val."""

from detectors.configs import autoloss_a, mmdet_config

_base_ = mmdet_config("mask_rcnn/mask_rcnn_r50_fpn_1x_coco.py")

model = dict(roi_head=dict(bbox_head=autoloss_a()))
custom_imports = dict(imports=["detectors"], allow_failed_imports=False)
