"""Loaded before every test: zlib before pycolmap, and threads that sleep while they wait, as on the command line."""

import os
import zlib  # noqa: F401  pycolmap 4.1 to 4.2.1 crash later where zlib was not loaded before them

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
