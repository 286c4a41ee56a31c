"""Where candidates come from: one small protocol, and who implements it.

A run names its strategy (``search.strategy``): ``evolution``, ``random``, or
``"package.module:Class"``.
"""

from cse_autoloss.strategies.base import FITTING, Member, Offspring, Strategy, load_strategy

__all__ = ["FITTING", "Member", "Offspring", "Strategy", "load_strategy"]
