"""Stage: the poses of query photos in a reference: our own output, or any COLMAP or hloc model with its images.

A query is compared with the reference images that look most like it. Its SIFT keypoints are matched
to the points that theirs see under the reference's poses; RANSAC and refinement give the pose, and
matches near where that sees the points refine it. Where too few agree DUSt3R is asked: matches of
its pointmaps give a pose, from which SIFT matches are sought once more. A query that neither
supports has no pose.

    python -m dust3r_sfm.localize --queries night --reference out --image_dir photos --output poses.txt
"""

from __future__ import annotations

import logging
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from dust3r_sfm.alignment.localization import Structure
from dust3r_sfm.errors import InputError
from dust3r_sfm.files import holding
from dust3r_sfm.formats.localization import write_logs, write_poses
from dust3r_sfm.formats.sparse_database import SparseMatches
from dust3r_sfm.geometry.lens import camera_with_lens
from dust3r_sfm.infer_pairs import InferConfig
from dust3r_sfm.models.dust3r import Dust3r
from dust3r_sfm.queries import (
    list_queries,
    load_neighbors,
    load_queries,
    make_query,
    nearest_images,
    photos_key,
    predict,
    reference_features,
)
from dust3r_sfm.query_poses import LocateConfig, Located, Query, locate_by_network, locate_by_sift
from dust3r_sfm.reference import (
    Reference,
    image_folder_of,
    read_reference,
    reference_of_scene,
    structure_of,
    with_seen,
)
from dust3r_sfm.scene import Scene
from dust3r_sfm.sparse_features import EMPTY, extract_sift
from dust3r_sfm.views import View

logger = logging.getLogger(__name__)


def main(
    queries: Path,
    reference: Path,
    output: Path,
    image_dir: Path | None = None,
    query_dir: Path | None = None,
    pairs_file: Path | None = None,
    num_matched: int = 10,
    model: str | None = None,
    on_bad_image: Literal["error", "skip"] = "error",
    basenames: bool = False,
    config: LocateConfig = LocateConfig(),  # noqa: B008  frozen
    infer: InferConfig = InferConfig(),  # noqa: B008  frozen
) -> None:
    """Find the poses of photos in a reference.

    Args:
        queries: A folder of photos, a photo, or a list as hloc has it: `name`, or `name MODEL width height params...`.
        reference: The output of reconstruct, the folder of a COLMAP or hloc model, or a cameras.json.
        output: Text file with a line `name qw qx qy qz tx ty tz` (camera from world) for each query that was found.
            <name>_logs.json beside it tells of each query how, or why not; <name>_files is kept for the next run.
        image_dir: The photos of the reference; the folder images beside it where not given.
        query_dir: Folder that the names of a list are below; image_dir where not given.
        pairs_file: Text file with lines `query reference_image`, in place of retrieval.
        num_matched: Reference images that a query is compared with: those that look most like it.
        model: Checkpoint file, folder or hub name; the shipped weights where not given.
        on_bad_image: Stop at queries that cannot be used, or leave them out.
        basenames: Write the queries' file names without their folders, as hloc does.
        config: How to find a pose.
        infer: How to run the network.
    """
    known = read_reference(reference)
    image_dir = image_dir or image_folder_of(reference)
    if image_dir is None:
        raise InputError(f"{reference} has no folder images beside it: name the reference's photos with --image_dir")
    folder, cameras = list_queries(queries, query_dir or image_dir)
    network = Dust3r.from_pretrained(model)
    views = load_queries(folder, cameras, network, on_bad_image)
    neighbors, reference_views = load_neighbors(network, views, known, image_dir, pairs_file, num_matched)
    output.parent.mkdir(parents=True, exist_ok=True)
    work = output.with_name(f"{output.stem}_files")
    with holding(work):
        sparse = reference_features(reference, image_dir, network, reference_views, work)
        own = extract_sift(folder, [view.name for view in views], [], work / f"queries-{photos_key(folder, views)}.db")
        asked = [make_query(view, cameras[view.name], known, own) for view in views]
        located = locate_all(network, asked, neighbors, known, sparse, reference_views, work, config, infer)
        write_poses(output, {name: found.pose.cam_from_world for name, found in located.items() if found}, basenames)
        write_logs(output.with_name(f"{output.stem}_logs.json"), _logs(located, neighbors))
    missing = [name for name, found in located.items() if found is None]
    logger.info("%d of %d queries were localised: %s.", len(located) - len(missing), len(located), output)
    for name in missing:
        logger.warning("No pose: too little in %s agrees with the %d nearest images.", name, len(neighbors[name]))


def locate_all(
    network: Dust3r,
    queries: Sequence[Query],
    neighbors: Mapping[str, Sequence[str]],
    reference: Reference,
    sparse: SparseMatches,
    views: Sequence[View],
    work: Path,
    config: LocateConfig,
    infer: InferConfig,
) -> dict[str, Located | None]:
    """Every query by name, None where it has no pose; the network is asked only for those that SIFT leaves open."""
    with tempfile.TemporaryDirectory(prefix=".triangulate", dir=work) as scratch:
        structure = structure_of(reference.only([view.name for view in views]), sparse, Path(scratch))
    reference = with_seen(reference, structure)
    found: dict[str, Located | None] = dict.fromkeys(query.name for query in queries)
    if config.method == "auto":
        for query in tqdm(queries, desc="Localise", unit="query", disable=None):
            found[query.name] = locate_by_sift(query, neighbors[query.name], structure, config)
    rest = [query for query in queries if found[query.name] is None]
    if rest:
        predictions = predict(network, rest, neighbors, views, work / "pointmaps.h5", infer)
        view_of = {view.name: view for view in views}
        for query in rest:
            images = neighbors[query.name]
            found[query.name] = locate_by_network(query, images, structure, reference, view_of, predictions, config)
    return found


def localize(
    model: Dust3r,
    scene: Scene,
    view: View,
    views: Sequence[View] | None = None,
    num_matched: int = 10,
    config: LocateConfig = LocateConfig(method="pnp"),  # noqa: B008  frozen
) -> Located | None:
    """The pose of a photo in a scene, from the network images alone; None where there is no support.

    `views` are those that the scene was made of, where it does not hold them itself. A known K of
    the view is held, else its focal is found. The stage of this name is more precise: it matches
    SIFT keypoints of the stored photos.
    """
    views = scene.views if views is None else views
    known = reference_of_scene(scene)
    there = [v for v in views if v.name in known.cameras]
    if not there:
        raise InputError("the scene's images are needed to compare the photo with: give the views it was made of")
    K = view.known_K
    camera = None if K is None else camera_with_lens(K.double().numpy(), view.original_size, view.lens)
    query = make_query(view, camera, known, EMPTY)
    neighbors = nearest_images(model, [view], there, num_matched)
    predictions = predict(model, [query], neighbors, there, None, InferConfig())
    nothing = Structure(np.zeros((0, 3)), {}, {})
    view_of = {v.name: v for v in there}
    return locate_by_network(query, neighbors[view.name], nothing, known, view_of, predictions, config)


def _logs(located: Mapping[str, Located | None], neighbors: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """hloc's fields for each query; PnP_ret is null for those without a pose, which hloc gives that of a neighbour."""
    logs: dict[str, Any] = {}
    for name, found in located.items():
        logs[name] = {"db": list(neighbors[name]), "PnP_ret": None, "reason": "too little agrees with these images"}
        if found is not None:
            pose, camera = found.pose, found.pose.camera
            logs[name] |= {
                "reason": f"by {found.by}",
                "PnP_ret": {
                    "cam_from_world": pose.cam_from_world,
                    "num_inliers": pose.num_inliers,
                    "inlier_mask": pose.inliers,
                    "camera": f"{camera.model.name} {camera.width} {camera.height} "
                    + " ".join(repr(float(x)) for x in camera.params),
                },
                "keypoints_query": pose.matches.pixels.round(3),
                "points3D_xyz": pose.matches.points_in_world,
                "num_matches": len(pose.matches),
            }
    return {"loc": logs}


if __name__ == "__main__":
    from dust3r_sfm.__main__ import main as run

    sys.exit(run(["localize", *sys.argv[1:]]))
