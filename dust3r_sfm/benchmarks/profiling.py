"""Which kernels and operations take the time."""

from __future__ import annotations

from collections.abc import Callable

import torch


def profile_table(run: Callable[[], object], rows: int = 15) -> str:
    """What took longest of one run, on the host and, where there is CUDA, on the device."""
    with torch.profiler.profile() as profiler:
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    averages = profiler.key_averages()
    keys = ["self_cpu_time_total"] + ["self_device_time_total"] * torch.cuda.is_available()
    return "\n".join(averages.table(sort_by=key, row_limit=rows, max_name_column_width=60) for key in keys)
