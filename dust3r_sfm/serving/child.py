"""`reconstruct` in a process of its own, which says on its standard output what it does and how it ended.

    python -m dust3r_sfm.serving.child --image_dir photos --output out

A line `stage <name>` where a stage begins. Where memory ran out, on the GPU or beside it, the exit code is 12.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

OUT_OF_MEMORY = 12


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
        # torch's own error for the GPU; for the CPU it raises a RuntimeError that names its allocator
        if isinstance(error, MemoryError) or "OutOfMemory" in type(error).__name__ or "allocate" in str(error):
            print(f"dust3r-sfm: out of memory: {error}", file=sys.stderr)
            return OUT_OF_MEMORY
        raise


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
