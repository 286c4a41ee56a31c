"""In which order candidates train: one small protocol, and who implements it.

A run names its ranker (``search.ranker``): ``model``, ``shuffled``, or ``"package.module:Class"``.
"""

from cse_autoloss.rankers.base import Belief, Measured, Ranker, Ranking, load_ranker, telling

__all__ = ["Belief", "Measured", "Ranker", "Ranking", "load_ranker", "telling"]
