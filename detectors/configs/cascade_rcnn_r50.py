"""Cascade R-CNN R50 with CSE-Autoloss-A in every stage, COCO 1x. The paper: 40.5 mAP on COCO
val."""

from detectors.configs import autoloss_a, changed, mmdet_config

_base_ = mmdet_config("cascade_rcnn/cascade_rcnn_r50_fpn_1x_coco.py")

model = dict(roi_head=dict(bbox_head=changed(_base_, "model.roi_head.bbox_head", autoloss_a())))
custom_imports = dict(imports=["detectors"], allow_failed_imports=False)
