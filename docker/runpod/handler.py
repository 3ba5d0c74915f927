"""The Runpod worker: hands jobs to `dust3r_sfm.serving`, and tells Runpod their stages.

python docker/runpod/handler.py                                       # on Runpod
python docker/runpod/handler.py --test_input '{"input": {...}}'       # one job on this machine, without Runpod
"""

from __future__ import annotations

import asyncio
import logging
import os
from functools import partial
from typing import Any

from dust3r_sfm.serving.job import Worker
from dust3r_sfm.serving.limits import Limits

logger = logging.getLogger("dust3r_sfm.handler")

CONCURRENCY = int(os.environ.get("DUST3R_SFM_CONCURRENCY") or 1)
"""Jobs at a time on one worker; each has a process of its own and they share the GPU."""


async def handler(job: dict[str, Any]) -> dict[str, Any]:
    """One job of Runpod's: `job["input"]` is the request, what is returned its manifest or error."""
    worker = Worker(limits=Limits.from_environment())
    return await asyncio.to_thread(worker.run, job.get("input"), partial(tell, job))


def tell(job: dict[str, Any], stage: str) -> None:
    """Say which stage a job is in: to Runpod, where this runs there, and to the log."""
    from runpod.serverless import progress_update

    logger.info("Job %s: %s.", job.get("id"), stage)
    if "RUNPOD_WEBHOOK_POST_OUTPUT" in os.environ:
        progress_update(job, {"stage": stage})


if __name__ == "__main__":
    import runpod

    logging.basicConfig(format="%(message)s", level=logging.INFO)
    runpod.serverless.start({"handler": handler, "concurrency_modifier": lambda _: CONCURRENCY})
