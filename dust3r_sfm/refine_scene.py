"""Stage: aligned scenes are refined to the accuracy of the stored photos, by SIFT matches and bundle adjustment.

Two models are made of the same verified matches: one from the poses of the alignment, one by
COLMAP's incremental mapping, which knows nothing of the network. The one that explains more is
taken: first more images that see at least 30 points, then more evidence (`Support`); COLMAP's
where the alignment's does not explain clearly more. Of few photos COLMAP also maps the matches
that no scene helped to find. Images that only the alignment has are placed beside it by the
alignment, relative to their nearest neighbour. Dense tracks fill the parts of photos that no
keypoint covers. Where no image can be verified the alignment stays, adjusted on its dense tracks.

    python -m dust3r_sfm.refine_scene --scene out/aligned.h5 --image_dir photos --matches out/matches.h5
        --output out/scene.h5
"""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
import sys
import tempfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from dust3r_sfm.alignment.anchoring import anchored, positions_of
from dust3r_sfm.alignment.attach import attached, in_frame_of
from dust3r_sfm.alignment.refine import RefineConfig, Support, refine, support
from dust3r_sfm.alignment.tracks import TrackConfig, build_tracks, with_colors
from dust3r_sfm.alignment.validation import refine_validated
from dust3r_sfm.continued_mapping import continue_mapping
from dust3r_sfm.export_scene import load_scene_views
from dust3r_sfm.files import write_bytes, writing
from dust3r_sfm.formats.colmap import colmap_from_scene
from dust3r_sfm.formats.colmap_scenes import DepthMaps, scene_from_colmap, seen_maps
from dust3r_sfm.formats.matches import read_matches
from dust3r_sfm.formats.pointmaps import hash_of
from dust3r_sfm.formats.scenes import read_scenes, write_scenes
from dust3r_sfm.formats.sparse_database import SparseMatches
from dust3r_sfm.mapping import (
    MAX_SHARED_TRY,
    Model,
    known_of,
    map_from_alignment,
    map_incrementally,
    select_tracks,
    stored_per_net,
    with_settled_lenses,
)
from dust3r_sfm.pairs import Matches, Pair
from dust3r_sfm.priors import in_known_frame
from dust3r_sfm.scene import Scene, Tracks, share_in_empty_cells
from dust3r_sfm.sparse_features import check_both, extract_sift, guide, import_features, known_cameras, within_masks
from dust3r_sfm.views import View

logger = logging.getLogger(__name__)


EQUAL = 0.995
"""The alignment's model explains clearly more where another has less than this share of its evidence."""


@dataclass(frozen=True, eq=False)
class Refinement:
    scenes: list[Scene]
    """Refined, with tracks, largest first."""
    figures: dict[str, Any]
    """What was compared and chosen, for summary.json."""


def main(
    scene: Path,
    image_dir: Path,
    matches: Path,
    output: Path,
    features: Path | None = None,
    feature_matches: Path | None = None,
    config: RefineConfig = RefineConfig(),  # noqa: B008  frozen
) -> None:
    """Refine aligned scenes by SIFT matches of the stored photos and bundle adjustment.

    Args:
        scene: What align_scene wrote, such as scene.h5.
        image_dir: The folder of photos it was made of.
        matches: What match_dense wrote, such as matches.h5.
        output: The file to write; SIFT features are kept beside it in features.db.
        features: Keypoints in SIFT's place: a feature file of hloc.
        feature_matches: The match file of hloc that goes with the features.
        config: How the models are adjusted.
    """
    check_both(features, feature_matches)
    database = output.with_name("features.db")
    with writing(output), writing(database):
        scenes = read_scenes(scene)
        views = load_scene_views(scenes, image_dir)
        dense = read_matches(matches)
        if features is not None and feature_matches is not None:
            sparse = import_features(image_dir, views, features, feature_matches)
        else:
            pairs = None if len(views) <= 40 else dense
            sparse = extract_sift(image_dir, [view.name for view in views], pairs, database)
        scenes = [build_tracks(one, dense, views) for one in scenes]
        refinement = refine_scenes(views, scenes, dense, sparse, output.parent, config)
        write_scenes(output, refinement.scenes)
    logger.info("%s %s", closing_line(refinement), output)


def refine_photos(
    image_dir: Path,
    views: Sequence[View],
    scenes: Sequence[Scene],
    matches: Mapping[Pair, Matches],
    pairs: Sequence[Pair] | None,
    output: Path,
    config: RefineConfig = RefineConfig(),  # noqa: B008  frozen
    tracks: TrackConfig = TrackConfig(),  # noqa: B008  frozen
    given: tuple[Path, Path] | None = None,
) -> Refinement:
    """`refine_scenes` with SIFT matches of the stored photos (of all pairs where None); kept below `output`.

    Features and matches of hloc's files are taken instead where they are given. An earlier
    run's features.db and scene.h5 are taken as they are where nothing has changed.
    """
    photos = _photos_key(views, pairs)
    key = hash_of(photos, repr(config), repr(tracks), *map(_scene_key, scenes), *map(_known_key, views))
    key = hash_of(key, *(path.read_bytes() for path in given)) if given else key
    note, path = output / ".refined.json", output / "scene.h5"
    earlier = json.loads(note.read_text()) if note.is_file() else {}
    if earlier.get("key") == key and path.is_file():
        logger.info("The scene in %s is refined already.", path)
        return Refinement(read_scenes(path), earlier["figures"])
    note.unlink(missing_ok=True)
    sparse = photo_features(image_dir, views, pairs, output, given)
    refinement = refine_scenes(views, scenes, matches, sparse, output, config, tracks)
    write_scenes(path, refinement.scenes)
    write_bytes(note, json.dumps({"key": key, "figures": refinement.figures}).encode())
    logger.info("%s", closing_line(refinement))
    return Refinement(read_scenes(path), refinement.figures)  # as a second run has them, rounded


def photo_features(
    image_dir: Path,
    views: Sequence[View],
    pairs: Sequence[Pair] | None,
    output: Path,
    given: tuple[Path, Path] | None = None,
) -> SparseMatches:
    """SIFT features and verified matches of the stored photos, kept in `output`/features.db; or those of hloc's files.

    Those of an earlier run are read where photos, pairs and known cameras are the same.
    """
    if given:
        return import_features(image_dir, views, *given)
    note, database, photos = output / ".features.json", output / "features.db", _photos_key(views, pairs)
    if not note.is_file() or json.loads(note.read_text()) != photos:
        note.unlink(missing_ok=True)
        database.unlink(missing_ok=True)
    sparse = extract_sift(image_dir, [view.name for view in views], pairs, database, known_cameras(views))
    write_bytes(note, json.dumps(photos).encode())
    return sparse


def _photos_key(views: Sequence[View], pairs: Sequence[Pair] | None) -> str:
    photos = hash_of(*(part for v in views for part in (v.name, v.image.numpy().tobytes(), repr(v.original_size))))
    return hash_of(photos, repr(pairs), *map(_known_camera_key, views))


def refine_scenes(
    views: Sequence[View],
    scenes: Sequence[Scene],
    matches: Mapping[Pair, Matches],
    sparse: SparseMatches,
    folder: Path,
    config: RefineConfig = RefineConfig(),  # noqa: B008  frozen
    tracks: TrackConfig = TrackConfig(),  # noqa: B008  frozen
) -> Refinement:
    """The scenes refined, by what explains more of the verified matches; `scenes` come with their dense tracks.

    Works in a temporary folder below `folder`. Scenes that no match verifies are adjusted on their
    dense tracks alone. Known poses are held, and COLMAP's mapping continues from them.
    """
    sparse = within_masks(sparse, views)
    scenes = [dataclasses.replace(scene, ids=None) for scene in scenes]  # numbers are for files, not for the work here
    depth_maps = {name: maps for scene in scenes for name, maps in seen_maps(scene).items()}
    for left in folder.glob(".refine-*"):  # by a killed run
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=".refine-", dir=folder) as work:
        candidates, figures = _candidates(views, scenes, matches, sparse, Path(work), config)
    chosen = choose(candidates)
    chosen = [_settled(model, views, config) for model in chosen]
    chosen, in_frame = _anchored(chosen, views, config)
    refined = [_refined_scene(model, views, scenes, depth_maps, matches, tracks, in_frame) for model in chosen]
    covered = {name for scene in refined for name in scene.names}
    refined += [_densely_refined(s, views, depth_maps, config) for s in scenes if not covered & set(s.names)]
    refined.sort(key=lambda scene: len(scene.names), reverse=True)
    refined, figures["frames"] = in_known_frame(refined, views, in_frame)
    figures["chosen"] = [{"origin": m.origin, "after": _figures(m.support)} for m in chosen]
    return Refinement(refined, figures)


def _candidates(
    views: Sequence[View],
    scenes: Sequence[Scene],
    matches: Mapping[Pair, Matches],
    sparse: SparseMatches,
    work: Path,
    config: RefineConfig,
) -> tuple[list[Model], dict[str, Any]]:
    """The models from the scenes' poses and COLMAP's, and what to say of them."""
    guided, trusts = sparse, []
    for scene in scenes:
        guided, trust = guide(guided, scene, matches)
        trusts.append(trust)
    if all(view.known_cam_from_world is None for view in views):
        mapped = _mapped(views, sparse, guided, work, config)
    else:
        mapped = continue_mapping(views, guided, work, config)
    rival = mapped[0].support if mapped else None
    aligned, lines = [], []
    for index, scene in enumerate(tqdm(scenes, desc="Refine", unit="scene", disable=None)):
        model, before = map_from_alignment(scene, views, guided, work, config, rival)
        line = {"origin": "alignment", "scene": index, "before": _figures(before), "after": _figures(model.support)}
        line["agreeing_pairs"] = f"{trusts[index].num_agreeing} of {trusts[index].num_pairs}"
        lines.append(line | {"guided": trusts[index].believed})
        aligned.append(model)
    lines += [{"origin": "mapping", "after": _figures(m.support)} for m in mapped]
    figures = {"verified_pairs": len(sparse.geometries), "guided_pairs": len(guided.geometries), "candidates": lines}
    return [*aligned, *mapped], figures


def _mapped(
    views: Sequence[View], plain: SparseMatches, guided: SparseMatches, work: Path, config: RefineConfig
) -> list[Model]:
    """COLMAP's models of the guided matches; of few photos those of the plain ones where these explain more.

    A scene that guides wrongly may lead COLMAP astray with matches that agree with it.
    """
    models = map_incrementally(views, guided, work, config)
    if guided is plain or len(views) > MAX_SHARED_TRY:
        return models
    unguided = map_incrementally(views, plain, work, config)
    is_better = unguided and (not models or unguided[0].support.explains_more_than(models[0].support))
    return unguided if is_better else models


def choose(candidates: Iterable[Model]) -> list[Model]:
    """Models of different images, each the one that explains most of the images that are left.

    An image belongs to the first model that has it; models that bring fewer than three new ones,
    or mostly old ones, are passed over. Where the alignment's does not explain clearly more, COLMAP's own is taken.
    """
    chosen: list[Model] = []
    covered: set[str] = set()
    left = [model for model in candidates if model.support.images >= 2]
    while left:
        best = left[0]
        for model in left[1:]:
            if model.support.explains_more_than(best.support) or _mapping_suffices(model, best):
                best = model
        chosen.append(best if not best.names & covered else best.without(covered))
        covered |= best.names
        left = [m for m in left if len(m.names - covered) >= 3 and len(m.names - covered) > len(m.names) / 2]
    return chosen


def _mapping_suffices(model: Model, best: Model) -> bool:
    """Whether a model is COLMAP's own and explains about as much as the alignment's."""
    if best.origin != "alignment" or model.origin == "alignment":
        return False
    own, other = model.support, best.support
    return own.images >= other.images and own.evidence >= EQUAL * other.evidence


def closing_line(refinement: Refinement) -> str:
    figures = refinement.figures
    origins = [f"{line['after']['verified_images']} images by {line['origin']}" for line in figures["chosen"]]
    return f"Refined over {figures['guided_pairs']} verified pairs: {', '.join(origins) or 'nothing verified'}."


def _settled(model: Model, views: Sequence[View], config: RefineConfig) -> Model:
    settled = with_settled_lenses(model, known_of(views), config)
    return Model(model.origin, settled, support(settled, config))


def _anchored(models: Sequence[Model], views: Sequence[View], config: RefineConfig) -> tuple[list[Model], set[str]]:
    """The models in the frame of known positions, where these tell one, and the names of all images that are in it."""
    positions, known, in_frame = positions_of(views), known_of(views), set()
    if not positions or known.poses:
        return list(models), in_frame
    result = []
    for model in models:
        found = anchored(model.reconstruction, positions, config, known.intrinsics, known.focal_priors)
        if found is not None:
            in_frame |= model.names
            model = Model(model.origin, found, support(found, config))  # noqa: PLW2901
        result.append(model)
    return result, in_frame


def _refined_scene(
    model: Model,
    views: Sequence[View],
    scenes: Sequence[Scene],
    depth_maps: DepthMaps,
    matches: Mapping[Pair, Matches],
    config: TrackConfig,
    in_frame: Collection[str],
) -> Scene:
    """The scene of a chosen model, with the images of the aligned one that it shares most with and in its frame.

    Images `in_frame` are in one that is known.
    """
    scene = scene_from_colmap(model.reconstruction, views, depth_maps)
    aligned = max(scenes, key=lambda s: len(set(s.names) & model.names), default=None)
    if aligned is not None and set(aligned.names) & model.names:
        if model.origin == "mapping" and model.names.isdisjoint(in_frame):
            scene = in_frame_of(scene, aligned)
        scene = attached(scene, aligned)
    dense = build_tracks(scene, matches, views, config).tracks
    return _with_fillers(with_colors(scene, views), dense)


def _densely_refined(scene: Scene, views: Sequence[View], depth_maps: DepthMaps, config: RefineConfig) -> Scene:
    """A scene that no sparse match verifies, adjusted on its dense tracks."""
    if scene.tracks is None or len(scene.tracks.errors) == 0:
        return scene
    view_of, known = {view.name: view for view in views}, known_of(views)
    # Keypoints of the network's grid are as precise as its pixels are fine.
    error_px = max(config.max_error_px, config.max_error_px * stored_per_net(scene) / 2)
    wider = dataclasses.replace(config, max_error_px=error_px)
    held = known.poses, known.intrinsics, known.focal_priors
    adjusted = refine_validated(colmap_from_scene(scene), wider, lambda model, config: refine(model, config, *held))
    if adjusted.kept_input:
        return scene
    return scene_from_colmap(adjusted.reconstruction, [view_of[name] for name in scene.names], depth_maps)


def _with_fillers(scene: Scene, dense: Tracks | None) -> Scene:
    """The scene with the dense tracks that lie where it has no keypoints."""
    if dense is None or len(dense.errors) == 0:
        return scene
    share = share_in_empty_cells(dense, scene.tracks, scene.original_sizes)
    return dataclasses.replace(scene, tracks=joined(scene.tracks, select_tracks(dense, share > 0.5)))


def joined(first: Tracks, second: Tracks) -> Tracks:
    values = {
        field.name: torch.cat([getattr(first, field.name), getattr(second, field.name)])
        for field in dataclasses.fields(Tracks)
    }
    values["point_indices"] = torch.cat([first.point_indices, second.point_indices + len(first.errors)])
    return Tracks(**values)


def _scene_key(scene: Scene) -> str:
    """What tells a scene from another: its cameras, and its tracks."""
    tensors = [scene.K, scene.cam_from_world]
    if scene.tracks is not None:
        tensors += [scene.tracks.keypoints, scene.tracks.points_in_world]
    return hash_of(*scene.names, *(tensor.cpu().numpy().tobytes() for tensor in tensors))


def _known_key(view: View) -> str:
    pose = view.known_cam_from_world
    known = (pose, view.known_position, view.position_sigma, view.known_depth)
    values = [b"" if x is None else x.numpy().tobytes() for x in known]
    return hash_of(_known_camera_key(view), *values, repr([view.focal_sigma, view.camera_group]))


def _known_camera_key(view: View) -> str:
    return repr([view.known_K if view.known_K is None else view.known_K.tolist(), view.lens])


def _figures(support: Support) -> dict[str, Any]:
    return {
        "verified_images": support.images,
        "observations": support.observations,
        "points": support.points,
        "score": round(support.score, 1),
        "evidence": round(support.evidence, 1),
        "mean_reprojection_error_px": round(support.mean_error_px, 3),
    }


if __name__ == "__main__":
    from dust3r_sfm.__main__ import main as run

    sys.exit(run(["refine-scene", *sys.argv[1:]]))
