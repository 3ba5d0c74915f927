"""What the package does in how much time: `dust3r-sfm benchmark NAME`."""

from __future__ import annotations

from collections.abc import Sequence

BENCHMARKS = {
    "adjustment": "Alignment, tracks and bundle adjustment side by side.",
    "alignment": "Global alignment, against descent on the published objective.",
    "inference": "Directed pairs a second, the share of the device's roof, and where the time goes.",
    "matching": "Matching two pointmaps: time, and the share of an exact search's matches.",
    "report": "The pages of a run over many photos: time and size.",
    "engine": "What many images cost the process that drives a run, with a network that does nothing.",
    "interruptions": "Stages that are killed at random moments, compared with runs that are not.",
    "retrieval": "Nearest neighbours among random descriptors: exact, and by the compressed index.",
    "scale": "Alignment of more and more images: error, time and memory.",
    "splatting": "Gaussian splats of a scene against those of the true cameras, on a CUDA device.",
    "training": "Where a training step's time goes on a CUDA device.",
}


def pick(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """The benchmark that the first argument names, and the other arguments; SystemExit with the names."""
    if arguments and arguments[0] in BENCHMARKS:
        return arguments[0], list(arguments[1:])
    width = max(map(len, BENCHMARKS))
    lines = [f"  {name:{width}}  {text}" for name, text in BENCHMARKS.items()]
    print("\n".join(["usage: dust3r-sfm benchmark NAME [--help] [options]", "", *lines]))
    raise SystemExit(0 if arguments[:1] in (["-h"], ["--help"]) else 2)
