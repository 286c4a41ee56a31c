"""Search loss functions for object detectors (CSE-Autoloss, ICLR 2021, as an open engine)."""
from cse_autoloss.expression import Expression, ExpressionError
from cse_autoloss.space import SearchSpace, SpaceError, load_space
from cse_autoloss.version import __version__

__all__ = ["Expression", "ExpressionError", "SearchSpace", "SpaceError", "__version__", "load_space"]
