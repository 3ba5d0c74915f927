"""Loaded before every test: zlib before pycolmap; threads that sleep while they wait, and one for each test process."""

import os
import zlib  # noqa: F401  pycolmap 4.1 to 4.2.1 crash later where zlib was not loaded before them

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if "PYTEST_XDIST_WORKER" in os.environ:  # one process a core already
    os.environ.setdefault("OMP_NUM_THREADS", "1")
