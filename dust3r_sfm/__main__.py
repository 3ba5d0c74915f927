"""The command line: one subcommand a stage. Logging is configured here and only here."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module

from dust3r_sfm import __version__
from dust3r_sfm.benchmarks import pick
from dust3r_sfm.errors import InputError, ReconstructionError

INSIST_AFTER_S = 3.0
"""Longer than any stage needs to leave its files in order."""
AT_ONCE_S = 0.01

COMMANDS = {
    "reconstruct": "A folder of photos becomes a COLMAP model: all of the stages below.",
    "demo": "Render photos of a scene, reconstruct them and compare with the truth.",
    "extract-frames": "Sharp frames of a video, spread evenly, as photos.",
    "infer-pairs": "Predict pointmaps of pairs of photos.",
    "filter-pairs": "Drop pairs that the network is not sure of.",
    "match-dense": "Match the pixels of pairs through their pointmaps.",
    "sparse-features": "SIFT keypoints of photos and their verified matches.",
    "align-scene": "Put all pairs into one frame: poses, focals and depth.",
    "refine-scene": "Refine aligned scenes by SIFT matches and bundle adjustment.",
    "export-scene": "Write an aligned scene as COLMAP models and a point cloud.",
    "view": "Look at a reconstruction in the browser, or make one file of it that opens anywhere.",
    "localize": "Find the poses of photos in a reconstruction or any COLMAP model.",
    "match-queries": "Add photos to hloc's files of a reconstruction, for its own localisation.",
    "evaluate": "Compare poses with a reference.",
    "evaluate-localization": "Localise each photo of posed scenes in the others and compare with its pose.",
    "evaluate-pairs": "Compare the network's predictions with the poses of reference pairs.",
    "train": "Train the network on procedural scenes, and on your own that have depth.",
    "plot-training": "Draw the curves of a run of training.",
    "extract-descriptors": "Describe each photo by a vector, close for photos of the same place.",
    "pairs-from-retrieval": "Pair each photo with those of the most similar descriptors.",
    "train-descriptor": "Learn the projection of descriptors on procedural places.",
    "evaluate-retrieval": "Measure how well descriptors find photos of the same scene.",
    "convert-weights": "Convert a published AP-GeM checkpoint to a file of numbers alone.",
    "benchmark": "Measure speed: one of several benchmarks.",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand. 0: done; 2: the input cannot be used, one sentence says why; 130: interrupted."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(f"dust3r-sfm {__version__}")
        return 0
    command = arguments[0].replace("_", "-")
    if command not in COMMANDS:
        print(f"dust3r-sfm: no command {arguments[0]}; there are: {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("dust3r_sfm").setLevel(logging.INFO)
    interrupted = threading.Event()
    try:
        with _insisting_interrupt(interrupted):
            _run(command, arguments[1:])
    except (Exception, KeyboardInterrupt) as error:
        if interrupted.is_set() or isinstance(error, KeyboardInterrupt):  # libraries make other errors of interrupts
            return _say("interrupted; run the same command to continue", 130)
        if isinstance(error, (InputError, ReconstructionError)):
            return _say(str(error), 2)
        if isinstance(error, OSError):
            return _say(_sentence(error), 2)
        raise
    return 0


@contextmanager
def _insisting_interrupt(interrupted: threading.Event) -> Iterator[None]:
    """Ctrl-C is noted in `interrupted`, and comes again until it is heeded.

    Python drops what is raised within a weak reference's callback.
    Where it says so (sys.unraisablehook) the interrupt comes again at once, without a traceback; where a library
    drops it in silence, after INSIST_AFTER_S.
    """
    main_thread = threading.main_thread()
    if threading.current_thread() is not main_thread or not hasattr(signal, "pthread_kill"):
        yield
        return
    timers: list[threading.Timer] = []

    def again(delay_s: float) -> None:
        timers.append(threading.Timer(delay_s, signal.pthread_kill, (main_thread.ident, signal.SIGINT)))
        timers[-1].daemon = True
        timers[-1].start()

    def interrupt(*_: object) -> None:
        interrupted.set()
        again(INSIST_AFTER_S)
        raise KeyboardInterrupt

    def dropped(unraisable: sys.UnraisableHookArgs) -> None:
        if issubclass(unraisable.exc_type, KeyboardInterrupt):
            again(AT_ONCE_S)
        else:
            hook_before(unraisable)

    hook_before, sys.unraisablehook = sys.unraisablehook, dropped
    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        for timer in timers:
            timer.cancel()
        signal.signal(signal.SIGINT, before)
        sys.unraisablehook = hook_before


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {command:{width}}  {text}" for command, text in COMMANDS.items()]
    return "\n".join(["usage: dust3r-sfm COMMAND [--help] [options]", "", *lines])


def _run(command: str, arguments: Sequence[str]) -> None:
    # waiting threads sleep: where other programs want the same cores, torch's spinning ones cost ten times the time
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when torch is loaded, below
    import tyro  # here, so that --help and --version need not wait for it

    if command == "benchmark":
        name, arguments = pick(arguments)
        command, stage = f"benchmark {name}", import_module(f"dust3r_sfm.benchmarks.{name}")
    else:
        stage = import_module(f"dust3r_sfm.{command.replace('-', '_')}")
    tyro.cli(
        stage.configured(arguments) if hasattr(stage, "configured") else stage.main,
        prog=f"dust3r-sfm {command}",
        args=arguments,
        use_underscores=True,
        # reconstruct has the configs of all stages, which share names: --match.max_error_px, --tracks.max_error_px
        config=() if command == "reconstruct" else (tyro.conf.OmitArgPrefixes,),
    )


def _sentence(error: OSError) -> str:
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror or error}. Once that is mended, the same command continues."


def _say(sentence: str, code: int) -> int:
    print(f"dust3r-sfm: {sentence}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
