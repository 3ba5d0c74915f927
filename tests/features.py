"""Local features in hloc's layout, and those of procedural rooms whose matches are true."""

import h5py
import numpy as np

SIZES = {"a/0.jpg": (64, 48), "b.jpg": (64, 48), "c.jpg": (64, 48)}


def write_features(path, keypoints, sizes=None, descriptors=None):
    with h5py.File(path, "w", libver="latest") as file:
        for name, xy in keypoints.items():
            group = file.create_group(name)
            group["keypoints"] = np.asarray(xy, dtype=np.float32) - 0.5  # hloc's first pixel has its centre at 0
            group["image_size"] = np.array((sizes or SIZES)[name], dtype=np.int64)
            if descriptors is not None:
                group["descriptors"] = descriptors[name].T.astype(np.float16)
    return path


def write_matches(path, matches):
    with h5py.File(path, "w", libver="latest") as file:
        for key, matches0 in matches.items():
            group = file.create_group(key)
            group["matches0"] = np.asarray(matches0, dtype=np.int16)
            group["matching_scores0"] = np.ones(len(matches0), np.float16)
    return path


def true_matches(scene):
    """The keypoints of a scene's tracks by name, and for each pair, by hloc's key, the row in the second of each."""
    tracks = scene.tracks
    rows = [(tracks.image_indices == i).nonzero()[:, 0] for i in range(len(scene.names))]
    keypoints = {name: tracks.keypoints[rows[i]].numpy() for i, name in enumerate(scene.names)}
    points = [tracks.point_indices[row].tolist() for row in rows]
    matches = {}
    for i, name0 in enumerate(scene.names):
        for j, name1 in enumerate(scene.names[i + 1 :], start=i + 1):
            row_of = {point: row for row, point in enumerate(points[j])}
            key = "/".join(name.replace("/", "-") for name in (name0, name1))
            matches[key] = np.array([row_of.get(point, -1) for point in points[i]])
    return keypoints, matches
