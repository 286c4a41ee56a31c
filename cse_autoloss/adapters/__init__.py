"""Searched losses in the libraries where people train.

Each module imports its library when it is imported itself, so none of them is needed for the rest:
:mod:`~cse_autoloss.adapters.transformers`, :mod:`~cse_autoloss.adapters.torchvision`,
:mod:`~cse_autoloss.adapters.ultralytics`.
"""
