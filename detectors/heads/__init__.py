"""IoU-aware heads: mmdet's own, which also tell the classification loss how well each positive is
localised.

A classification loss that needs ``pos_ious`` gets it; any other is called as mmdet calls it.
"""

# Imported for what they register.
from detectors.heads import one_stage, other, seeing, two_stage  # noqa: F401
