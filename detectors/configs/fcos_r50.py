"""FCOS R50 with CSE-Autoloss-B, COCO 1x. The paper: 39.6 mAP on COCO val.

The config that it inherits has norm_on_bbox, centerness_on_reg and center_sampling.
"""

from detectors.configs import autoloss_b, mmdet_config

_base_ = mmdet_config("fcos/fcos_center-normbbox-centeronreg-giou_r50_caffe_fpn_gn-head_1x_coco.py")

model = dict(bbox_head=autoloss_b("IoUAwareFCOSHead"))
custom_imports = dict(imports=["detectors"], allow_failed_imports=False)
