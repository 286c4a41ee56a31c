"""What all tests share: one core a process, and caches of their own only where a test asks for
them."""

import os
import random
from pathlib import Path

import pytest
from hypothesis import settings

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(name, "1")
# Ray's workers are processes of their own: they find the tests' modules by this.
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
)

# No deadlines: machines differ. In CI the same examples every time; elsewhere new ones, and the
# case that fell is printed.
settings.register_profile("here", deadline=None, print_blob=True)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "here")


@pytest.fixture(autouse=True)
def same_draws() -> None:
    """What a test draws without a generator of its own is the same whichever tests ran before."""
    import numpy as np  # not before the number of threads is set
    import torch

    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
