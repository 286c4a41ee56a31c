"""Data sets: any real one is read, checked and split, or refused in one line."""

from detectors.datasets.dataset import DataSet, Name, Split, absolute, examine, find

__all__ = ["DataSet", "Name", "Split", "absolute", "examine", "find"]
