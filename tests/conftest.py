"""Settings of all tests."""

import os

import numpy as np  # noqa: F401 - its BLAS must be loaded before it can be limited
import scipy.linalg  # noqa: F401
from threadpoolctl import threadpool_limits

# Idle threads of BLAS spin, which slows small problems tenfold on a busy host.
threadpool_limits(1)

# Processes of a test runner are told a width of 80 columns: tables would be cut off.
os.environ.pop("COLUMNS", None)
