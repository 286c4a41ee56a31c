"""IoU-aware heads: mmdet's own, which also tell the classification loss how well each positive is
localised.

A classification loss that names ``pos_ious`` among its arguments gets it; any other is called as
mmdet calls it.
"""

from detectors.heads import one_stage, two_stage  # noqa: F401 - imported for what they register
