"""Search loss functions for object detectors (CSE-Autoloss, ICLR 2021, as an open engine)."""
from cse_autoloss.expression import Expression, ExpressionError
from cse_autoloss.space import SearchSpace, SpaceError, load_space

__version__ = "0.1.0"
__all__ = ["Expression", "ExpressionError", "SearchSpace", "SpaceError", "load_space"]
