"""ATSS R50 with CSE-Autoloss-B, COCO 1x. The paper: 40.5 mAP on COCO val.

The regression loss has weight 1, where ATSS's own has 2.
"""

from detectors.configs import autoloss_b, mmdet_config

_base_ = mmdet_config("atss/atss_r50_fpn_1x_coco.py")

model = dict(bbox_head=autoloss_b("IoUAwareATSSHead"))
custom_imports = dict(imports=["detectors"], allow_failed_imports=False)
