"""`reconstruct` in a process of its own, which says on its standard output what it does and how it ended.

    python -m dust3r_sfm.serving.child --image_dir photos --output out

A line `stage <name>` where a stage begins. Where memory ran out, on the GPU or beside it, the exit code is 12.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

import torch

OUT_OF_MEMORY = 12
SIGNS = ("out of memory", "ALLOC_FAILED", "allocate")
"""In RuntimeErrors for want of memory: of CUDA itself, of cuBLAS and cuDNN, of torch's allocator on the CPU."""


class _Stages(logging.Handler):
    """Prints the stages that the summary logs."""

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if message.startswith("stage "):
            print(message, flush=True)


def main(arguments: Sequence[str]) -> int:
    """The exit code of `reconstruct`, or 12 where memory ran out."""
    from dust3r_sfm.__main__ import main as run

    stages = logging.getLogger("dust3r_sfm.summary")
    stages.setLevel(logging.DEBUG)
    stages.addHandler(_Stages())
    try:
        return run(["reconstruct", *arguments])
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            print(f"dust3r-sfm: out of memory: {error}", file=sys.stderr)
            return OUT_OF_MEMORY
        raise


def is_out_of_memory(error: MemoryError | RuntimeError) -> bool:
    """Whether memory ran out, on the GPU or beside it: only torch's own allocator has an error of its own for that."""
    kinds = (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, kinds) or any(sign in str(error) for sign in SIGNS)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
