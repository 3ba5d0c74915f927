"""Stage: all stages in turn, from a folder of photos to COLMAP models. Interrupted, the same command continues."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from dust3r_sfm.align_scene import align_views, alignment_device
from dust3r_sfm.alignment.align import AlignConfig
from dust3r_sfm.alignment.refine import RefineConfig
from dust3r_sfm.alignment.tracks import TrackConfig, build_tracks
from dust3r_sfm.engine import EngineConfig
from dust3r_sfm.errors import InputError, ReconstructionError
from dust3r_sfm.export_scene import ExportConfig, check_formats, export_scenes, refuse_foreign_model
from dust3r_sfm.extract_frames import FrameConfig, extract_frames
from dust3r_sfm.files import holding, write_bytes
from dust3r_sfm.filter_pairs import FilterConfig, decide_pairs, keep_pairs, with_doubts
from dust3r_sfm.formats.colmap import check_text_names, read_colmap
from dust3r_sfm.formats.continued import continued
from dust3r_sfm.formats.known_cameras import read_known_cameras
from dust3r_sfm.formats.masks import read_masks
from dust3r_sfm.formats.matches import write_matches
from dust3r_sfm.formats.pairs import read_pairs
from dust3r_sfm.formats.pointmaps import hash_of
from dust3r_sfm.formats.scenes import read_scenes, write_scenes
from dust3r_sfm.graph import PairKind, make_pairs, symmetrize
from dust3r_sfm.infer_pairs import InferConfig, infer_pairs, prediction_keys
from dust3r_sfm.match_dense import MatchConfig, match_dense
from dust3r_sfm.models.dust3r import Dust3r
from dust3r_sfm.pairs import Matches, Pair, Predictions, PredictionsOn, SomePredictions
from dust3r_sfm.pairs_from_retrieval import pairs_from_retrieval
from dust3r_sfm.priors import PriorConfig, in_known_frame, with_known_depths, with_priors
from dust3r_sfm.reference import model_folder, warn_of_missing
from dust3r_sfm.refine_scene import photo_features, refine_photos
from dust3r_sfm.report import write_reports
from dust3r_sfm.scene import Scene
from dust3r_sfm.sparse_features import check_both
from dust3r_sfm.summary import Summary
from dust3r_sfm.views import View, list_images, load_views, read_views

logger = logging.getLogger(__name__)

MAX_EXHAUSTIVE = 40
"""Up to so many images every one is paired with every other, unless told otherwise."""


@dataclass(frozen=True, kw_only=True)
class ReconstructConfig:
    """The stages' own configs."""

    infer: InferConfig = InferConfig()
    filter: FilterConfig = FilterConfig()
    align: AlignConfig = AlignConfig()
    match: MatchConfig = MatchConfig()
    tracks: TrackConfig = TrackConfig()
    bundle: RefineConfig = RefineConfig()
    export: Annotated[ExportConfig, tyro.conf.arg(name="")] = ExportConfig()
    frames: Annotated[FrameConfig, tyro.conf.arg(name="")] = FrameConfig()
    engine: Annotated[EngineConfig, tyro.conf.arg(name="")] = EngineConfig()
    priors: Annotated[PriorConfig, tyro.conf.arg(name="")] = PriorConfig()


def main(
    image_dir: Path | None = None,
    output: Path = tyro.MISSING,
    model: str | None = None,
    video: Path | None = None,
    pairs: Literal["auto", "retrieval"] | PairKind = "auto",
    window: int = 3,
    num_matched: int = 20,
    pairs_file: Path | None = None,
    cameras: Path | None = None,
    previous_model: Path | None = None,
    masks: Path | None = None,
    depths: Path | None = None,
    features: Path | None = None,
    matches: Path | None = None,
    on_bad_image: Literal["error", "skip"] = "error",
    refine: Literal["ba", "none"] = "ba",
    text: bool = False,
    config: Annotated[ReconstructConfig, tyro.conf.arg(name="")] = ReconstructConfig(),
) -> Summary:
    """Make a COLMAP model of a folder of photos.

    Args:
        image_dir: Folder of photos, sub-folders included; or give a video.
        output: Folder for sparse/0, sparse/1, ..., database.db, points.ply, summary.json, report.html and the stages'
            files.
        model: Checkpoint file, folder or hub name; the shipped weights where not given.
        video: A video in place of the photos; its sharp frames go to the output's folder frames.
        pairs: Which photos to compare: auto is exhaustive up to 40 photos, and those that look alike (retrieval) above;
            sequential for a video.
        window: Neighbours of a photo in sequential and logarithmic pairs.
        num_matched: Partners of a photo in retrieval pairs.
        pairs_file: Text file with two image names a line, as hloc writes it, in place of the pairs above.
        cameras: Known intrinsics and poses of some or all photos: a cameras.json or the folder of a COLMAP model.
        previous_model: A COLMAP model of some of the photos, or an earlier output: its cameras, poses and points stay,
            with their numbers, and the other photos are added.
        masks: Folder with <image name>.png for some or all photos, black where a photo may not be used.
        depths: Known depths of some or all photos, which make the result metric: a folder with <image name>.npy in
            metres or .png in millimetres, or a cameras.json.
        features: Keypoints in SIFT's place: a feature file of hloc.
        matches: The match file of hloc that goes with the features.
        on_bad_image: Stop at photos that cannot be used, or leave them out.
        refine: ba adds SIFT matches of the stored photos and adjusts all cameras and points; none keeps the alignment.
        text: Write the COLMAP models as text too.
        config: Options of the stages.
    """
    if (image_dir is None) == (video is None):
        raise InputError("expected either --image_dir, a folder of photos, or --video, a video file")
    if previous_model is not None and cameras is not None:
        raise InputError("--previous_model has the cameras already: give it or --cameras")
    check_both(features, matches)
    given = (features, matches) if features is not None and matches is not None else None
    if config.engine.shard is not None:
        raise InputError("a share is done by single stages: extract-descriptors, infer-pairs, match-dense have --shard")
    refuse_foreign_model(output)
    summary = Summary()
    with holding(output):
        if video is not None:
            image_dir, pairs = output / "frames", "video" if pairs == "auto" else pairs
            if config.priors.share_camera == "auto":
                config = replace(config, priors=replace(config.priors, share_camera="all"))
            with summary.timed("extract_frames"):
                extract_frames(video, image_dir, config.frames)
        if previous_model is not None:
            cameras = model_folder(previous_model)
            warn_of_missing(cameras, list_images(image_dir))
        network, views = _load(image_dir, model, cameras, on_bad_image, summary)
        if masks is not None:
            views = read_masks(masks, views)
        views, summary.origin = with_priors(views, image_dir, config.priors, cameras)
        if depths is not None:
            views = with_known_depths(views, depths)
        summary.views, summary.image_dir = views, image_dir
        if text:
            check_text_names(summary.names)
        check_formats(config.export, summary.names)
        directed = _choose_pairs(network, views, pairs, window, num_matched, pairs_file)
        try:
            failure = None
            try:
                verify = partial(_verified, image_dir, views, directed, output, summary, given)
                verify = verify if refine == "ba" else None
                scenes, dense = _align_and_match(network, views, directed, output, config, summary, verify)
            except ReconstructionError as error:  # SIFT alone may still register the photos
                if refine == "none":
                    raise
                scenes, dense, failure = [], {}, error
            if refine == "none":
                scenes, frames = in_known_frame(scenes, views)
                summary.refinement = {"frames": frames}
            else:
                scenes = _refine(image_dir, views, scenes, dense, directed, output, config, summary, given)
            if failure is not None:
                summary.refinement = {**summary.refinement, "alignment": str(failure)}
                if not scenes:
                    raise failure
            if previous_model is not None:
                scenes = continued(scenes, read_colmap(cameras))
            _export(scenes, views, output, text, summary, config.export, image_dir, dense)
        except BaseException:
            with suppress(OSError):  # a full disk, say, of which the first error tells
                _tell(summary, output)
            raise
        _tell(summary, output)
    logger.info("%s %s", summary.closing_line(), output / "sparse")
    return summary


def _tell(summary: Summary, output: Path) -> None:
    summary.write(output / "summary.json")
    write_reports(output, summary)


def _verified(
    image_dir: Path,
    views: Sequence[View],
    pairs: Sequence[Pair],
    output: Path,
    summary: Summary,
    given: tuple[Path, Path] | None,
) -> dict[Pair, int] | None:
    """How many matches of the stored photos are verified, by pair; None where none are."""
    with summary.timed("sparse_features"):
        sparse = photo_features(image_dir, views, _matched_pairs(views, pairs), output, given)
    return {pair: len(geometry.inlier_matches) for pair, geometry in sparse.geometries.items()} or None


def _matched_pairs(views: Sequence[View], pairs: Sequence[Pair]) -> Sequence[Pair] | None:
    """Whose keypoints are matched: of few photos all, which is None."""
    return None if len(views) <= MAX_EXHAUSTIVE else pairs


def _align_and_match(
    network: Dust3r,
    views: Sequence[View],
    pairs: Sequence[Pair],
    output: Path,
    config: ReconstructConfig,
    summary: Summary,
    verify: Callable[[], Mapping[Pair, int] | None] | None,
) -> tuple[list[Scene], dict[Pair, Matches]]:
    """Aligned scenes with tracks of the dense matches; `verify` counts the verified matches of pairs."""
    with summary.timed("infer_pairs"):
        predictions = infer_pairs(
            network, views, pairs, output / "pointmaps.h5", config.infer, config.engine, config.match
        )
    num_verified = verify() if verify is not None else None
    with summary.timed("filter_pairs"):
        summary.decisions = decide_pairs(predictions, summary.names, config.filter, num_verified)
        kept = keep_pairs(predictions, summary.decisions)
    with summary.timed("align_scene"):
        scenes = _align(network, views, kept, output, config)
        summary.decisions = with_doubts(summary.decisions, scenes)
        kept = SomePredictions(predictions, [decision.pair for decision in summary.decisions if decision.kept])
    with summary.timed("match_dense"):
        matches = summary.matches = match_dense(views, kept, config.match, output / "matches.h5", config.engine)
    with summary.timed("tracks"):
        return [build_tracks(scene, matches, views, config.tracks) for scene in scenes], matches


def _refine(
    image_dir: Path,
    views: Sequence[View],
    scenes: Sequence[Scene],
    matches: Mapping[Pair, Matches],
    pairs: Sequence[Pair],
    output: Path,
    config: ReconstructConfig,
    summary: Summary,
    given: tuple[Path, Path] | None,
) -> list[Scene]:
    with summary.timed("refine_scene"):
        configs = config.bundle, config.tracks
        chosen = _matched_pairs(views, pairs)
        refinement = refine_photos(image_dir, views, scenes, matches, chosen, output, *configs, given)
    summary.refinement = refinement.figures
    return refinement.scenes


def _export(
    scenes: Sequence[Scene],
    views: Sequence[View],
    output: Path,
    text: bool,
    summary: Summary,
    config: ExportConfig,
    image_dir: Path,
    matches: Mapping[Pair, Matches],
) -> None:
    with summary.timed("export_scene"):
        export_scenes(scenes, views, output, text, config, image_dir, matches)
        write_scenes(output / "scene.h5", scenes)
        if not matches:  # else they are there
            write_matches(output / "matches.h5", matches)
    summary.scenes = scenes


def _load(
    image_dir: Path, model: str | None, cameras: Path | None, on_bad_image: str, summary: Summary
) -> tuple[Dust3r, list[View]]:
    with summary.timed("load"):
        network = Dust3r.from_pretrained(model)
        size, square_ok = network.config.image_size, network.config.square_ok
        known = read_known_cameras(cameras, list_images(image_dir)) if cameras is not None else None
        if on_bad_image == "skip":
            views, summary.rejected = read_views(image_dir, size, square_ok=square_ok, cameras=known)
        else:
            views = load_views(image_dir, size, square_ok=square_ok, cameras=known)
        summary.model, summary.names = network, [view.name for view in views]
        for name, reason in summary.rejected.items():
            logger.warning("Left out: %s %s.", name, reason)
        if len(views) < 2:
            raise InputError(f"{image_dir} has {len(views)} usable images: at least two that overlap are needed")
        return network, views


def _choose_pairs(
    network: Dust3r, views: Sequence[View], kind: str, window: int, num_matched: int, pairs_file: Path | None
) -> list[Pair]:
    names = [view.name for view in views]
    if pairs_file is not None:
        return symmetrize(read_pairs(pairs_file, names))
    if kind == "video":
        return make_pairs(names, "sequential", window, cyclic=False)
    if kind == "auto":
        kind = "exhaustive" if len(names) <= MAX_EXHAUSTIVE else "retrieval"
    if kind != "retrieval":
        return make_pairs(names, kind, window)
    # photos are mostly taken in the order of their names: the next one too
    pairs = pairs_from_retrieval(views, num_matched, network, sequence_window=1)
    logger.info("%d images: about %d that look alike are compared with each.", len(names), num_matched)
    return pairs


def _align(
    network: Dust3r, views: Sequence[View], predictions: Predictions, output: Path, config: ReconstructConfig
) -> list[Scene]:
    """Aligned scenes; those of an earlier run where nothing that they depend on has changed."""
    keys = prediction_keys(network, views, list(predictions)).values()
    known = [(v.name, v.known_K, v.known_cam_from_world, v.lens, v.known_position, v.position_sigma) for v in views]
    masks = [b"" if view.mask is None else view.mask.cpu().numpy().tobytes() for view in views]
    known = repr([[x.tolist() if isinstance(x, torch.Tensor) else x for x in k] for k in known])
    known += repr([view.focal_sigma for view in views])
    key = hash_of(repr(config.align), known, *masks, *keys)
    path, done = output / "aligned.h5", output / ".aligned.json"
    if path.is_file() and done.is_file() and json.loads(done.read_text()) == key:
        logger.info("The scene in %s is aligned already.", path)
        return read_scenes(path)
    done.unlink(missing_ok=True)  # before the scene changes: a kill in between must not leave an old key beside it
    there = PredictionsOn(predictions, alignment_device(config.infer))
    scenes = align_views(views, there, config.align, config.engine)
    write_scenes(path, scenes)
    write_bytes(done, json.dumps(key).encode())
    return read_scenes(path)  # as a second run has them, rounded


if __name__ == "__main__":
    from dust3r_sfm.__main__ import main as run

    sys.exit(run(["reconstruct", *sys.argv[1:]]))
