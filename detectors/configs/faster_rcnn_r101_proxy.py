"""The proxy of Faster R-CNN R101: that of R50 with ResNet-34 in ResNet-18's place."""

_base_ = "./faster_rcnn_proxy.py"

model = dict(backbone=dict(depth=34))
