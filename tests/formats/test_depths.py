import dataclasses
import json

import numpy as np
import pycolmap
import pytest
import torch
from aligned import true_scene
from PIL import Image
from procedural import STORED_PER_NET, cast_rays, make_scene

from dust3r_sfm.alignment.tracks import build_tracks
from dust3r_sfm.errors import InputError
from dust3r_sfm.formats.colmap import read_colmap
from dust3r_sfm.formats.dense import normals_in_cam, read_array, write_array, write_dense
from dust3r_sfm.formats.depths import depth_map, write_depths
from dust3r_sfm.formats.masks import read_masks, write_masks
from dust3r_sfm.match_dense import match_dense

NUM_VIEWS = 5


@pytest.fixture(scope="module")
def procedural():
    return make_scene(NUM_VIEWS, (72, 96), seed=3)


@pytest.fixture(scope="module")
def scene(procedural):
    return true_scene(procedural)


@pytest.fixture(scope="module")
def image_dir(procedural, tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    save_photos(procedural, folder)
    return folder


def save_photos(procedural, folder):
    for view in procedural.views:
        (folder / view.name).parent.mkdir(exist_ok=True)
        Image.fromarray(view.image.numpy()).resize(view.original_size, 0).save(folder / view.name, quality=95)


def cast(procedural, index, K, width, height):
    """Depth and normals (in the camera) that the ray caster finds at a grid's cell centres."""
    y, x = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) + 0.5 for n in (height, width)), indexing="ij")
    pose = procedural.cam_from_world[index].double()
    rays = torch.stack([(x - K[0, 2]) / K[0, 0], (y - K[1, 2]) / K[1, 1], torch.ones_like(x)], -1) @ pose[:3, :3]
    depth, normals = cast_rays(procedural.shapes, -pose[:3, :3].T @ pose[:3, 3], rays)
    return depth.numpy(), (normals @ pose[:3, :3].T).numpy()


def test_depth_as_the_network_saw_it_is_the_scene_s(scene):
    found = depth_map(scene, 1)
    np.testing.assert_allclose(found.depth, scene.depth[1], rtol=1e-6)
    np.testing.assert_allclose(found.K, scene.K[1], rtol=1e-6)
    assert (found.confidence == 1).all()


def test_depth_at_the_file_s_resolution_lies_on_the_surface(procedural, scene):
    found = depth_map(scene, 0, "original")
    width, height = scene.original_sizes[0]
    assert found.depth.shape == (height, width)
    expected, _ = cast(procedural, 0, procedural.K[0].double() * torch.tensor([[2.0], [2.0], [1.0]]), width, height)
    error = np.abs(found.depth / expected - 1)
    assert np.quantile(error, 0.8) < 2e-3  # the rest: edges, where the network has no finer answer
    assert np.median(error) < 1e-5  # planes are exact


@pytest.mark.parametrize("turns", [0, 1, 2, 3])
def test_depth_of_a_cropped_and_turned_file_lies_where_its_pixels_do(procedural, scene, turns):
    """Stored at the network's fineness, turned by quarter turns, with 8 columns more to the left and 4 to the right."""
    h, w = scene.depth[0].shape
    padded_w = w + 12
    net_from_upright = torch.tensor([[1.0, 0, -8], [0, 1, 0], [0, 0, 1]], dtype=torch.float64)
    turn = {
        0: [[1, 0, 0], [0, 1, 0]],
        1: [[0, -1, padded_w], [1, 0, 0]],
        2: [[-1, 0, padded_w], [0, -1, h]],
        3: [[0, 1, 0], [-1, 0, h]],
    }[turns]
    net_from_img = net_from_upright @ torch.tensor([*turn, [0, 0, 1]], dtype=torch.float64)
    size = (padded_w, h) if turns % 2 == 0 else (h, padded_w)
    changed = dataclasses.replace(
        scene, net_from_img=net_from_img.repeat(NUM_VIEWS, 1, 1), original_sizes=(size,) * NUM_VIEWS
    )
    upright = np.pad(scene.depth[0].numpy(), ((0, 0), (8, 4)))
    found = depth_map(changed, 0)
    np.testing.assert_allclose(found.depth, np.rot90(upright, turns), rtol=1e-5)
    assert ((found.confidence > 0) == (found.depth > 0)).all()


def test_masked_pixels_and_pixels_without_depth_are_zero(scene):
    depth = scene.depth[0].clone()
    depth[3, 4], depth[5, 6] = torch.nan, -1
    mask = torch.ones_like(depth, dtype=torch.bool)
    mask[10:20, 30] = False
    found = depth_map(dataclasses.replace(scene, depth=(depth, *scene.depth[1:])), 0, mask=mask)
    empty = np.zeros(depth.shape, dtype=bool)
    empty[3, 4] = empty[5, 6] = True
    empty[10:20, 30] = True
    assert ((found.depth == 0) == empty).all()
    assert ((found.confidence == 0) == empty).all()


@pytest.mark.parametrize("size", ["network", "original"])
@pytest.mark.parametrize("kind", ["png", "npy"])
def test_depths_come_back_from_files_through_their_units(scene, kind, size, tmp_path):
    write_depths(scene, tmp_path, kind, size)
    units = json.loads((tmp_path / "units.json").read_text())
    farthest = max(float(depth.max()) for depth in scene.depth)
    for i, name in enumerate(scene.names):
        paths = [tmp_path / part / f"{name}.{kind}" for part in ("depth", "confidence")]
        values = [np.load(path) if kind == "npy" else np.asarray(Image.open(path)) for path in paths]
        assert values[0].dtype == (np.float32 if kind == "npy" else np.uint16)
        expected = depth_map(scene, i, size)
        np.testing.assert_allclose(values[0] * units["depth_unit"], expected.depth, atol=farthest / 65_535)
        np.testing.assert_allclose(values[1] * units["confidence_unit"], expected.confidence, atol=0.01)


def test_normals_face_the_camera_and_are_those_of_the_surface(procedural, scene):
    found = depth_map(scene, 2)
    normals = normals_in_cam(found)
    _, expected = cast(procedural, 2, procedural.K[2].double(), 96, 72)
    cosine = (normals * expected).sum(axis=-1)
    assert np.median(cosine) > 0.999
    assert (cosine > np.cos(np.deg2rad(10))).mean() > 0.85  # the rest: within two pixels of a crease
    np.testing.assert_allclose(np.linalg.norm(normals, axis=-1), 1, atol=1e-5)


def test_normals_of_a_noisy_plane_agree(scene):
    """Fusion takes pixels for one surface where normals differ by less than 10 degrees."""
    generator = torch.Generator().manual_seed(0)
    depth = 4.0 * (1 + 1e-3 * torch.randn(scene.depth[0].shape, generator=generator))
    normals = normals_in_cam(depth_map(dataclasses.replace(scene, depth=(depth, *scene.depth[1:])), 0))
    assert (normals[..., 2] < -np.cos(np.deg2rad(10))).mean() > 0.95


def test_arrays_have_one_plane_a_channel_as_colmap_reads_them(tmp_path):
    values = np.arange(24, dtype=np.float32).reshape(2, 4, 3)
    write_array(tmp_path / "n.bin", values)
    assert (tmp_path / "n.bin").read_bytes() == b"4&2&3&" + values.transpose(2, 0, 1).tobytes()
    np.testing.assert_array_equal(read_array(tmp_path / "n.bin"), values)
    write_array(tmp_path / "d.bin", values[..., 0])
    if not hasattr(pycolmap, "DepthMap"):
        pytest.skip("this pycolmap does not show its reader")
    read_by_colmap = pycolmap.DepthMap()
    read_by_colmap.read(str(tmp_path / "d.bin"))
    np.testing.assert_array_equal(read_by_colmap.to_array(), values[..., 0])


def test_fusion_of_the_dense_workspace_lies_on_the_surface(procedural, scene, image_dir, tmp_path):
    matches = match_dense(procedural.views, procedural.predictions)
    tracked = build_tracks(scene, matches, procedural.views)  # whose points tell COLMAP which images overlap
    write_dense(tracked, image_dir, tmp_path / "dense")
    stereo = tmp_path / "dense" / "stereo"
    assert (stereo / "fusion.cfg").read_text().split() == list(scene.names)
    assert (stereo / "patch-match.cfg").read_text() == "".join(f"{n}\n__auto__, 20\n" for n in scene.names)
    assert sorted(path.name for path in stereo.iterdir()) == [
        *("consistency_graphs", "depth_maps", "fusion.cfg", "normal_maps", "patch-match.cfg")
    ]
    model = read_colmap(tmp_path / "dense" / "sparse")
    assert {camera.model.name for camera in model.cameras.values()} == {"PINHOLE"}
    pycolmap.logging.minloglevel = 2
    options = pycolmap.StereoFusionOptions({"min_num_pixels": 3})
    (tmp_path / "fused").mkdir()
    output = tmp_path / "fused" / ("" if pycolmap.__version__ >= "4" else "fused.ply")
    fused = pycolmap.stereo_fusion(str(output), str(tmp_path / "dense"), options=options)
    points = np.array([point.xyz for point in fused.points3D.values()])
    assert len(points) > 1500
    distances = distance_to_surface(procedural, points)
    assert np.median(distances) < 0.02  # of a room of 8 by 8 by 3.2, seen in pixels of 0.05
    assert np.quantile(distances, 0.95) < 0.05
    colors = np.array([point.color for point in fused.points3D.values()])
    assert colors.std() > 20


def distance_to_surface(procedural, points):
    """From each point to the nearest of what the cameras see of the world, finely cast."""
    from scipy.spatial import cKDTree

    seen = []
    for i in range(NUM_VIEWS):
        scale = torch.tensor([[4.0], [4.0], [1.0]])
        K, pose = procedural.K[i].double() * scale, procedural.cam_from_world[i].double()
        y, x = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) + 0.5 for n in (288, 384)), indexing="ij")
        rays = torch.stack([(x - K[0, 2]) / K[0, 0], (y - K[1, 2]) / K[1, 1], torch.ones_like(x)], -1) @ pose[:3, :3]
        origin = -pose[:3, :3].T @ pose[:3, 3]
        depth, _ = cast_rays(procedural.shapes, origin, rays)
        seen.append((origin + depth[..., None] * rays).reshape(-1, 3).numpy())
    return cKDTree(np.concatenate(seen)).query(points)[0]


def test_a_missing_photo_is_named(scene, tmp_path):
    with pytest.raises(InputError, match=r"there is no image .*000\.jpg"):
        write_dense(scene, tmp_path, tmp_path / "dense")


def test_masks_are_read_by_colmap_s_names_and_written_back(procedural, tmp_path):
    name = procedural.views[0].name
    width, height = procedural.views[0].original_size
    mask = np.full((height, width), 255, dtype=np.uint8)
    mask[20:40, 60:] = 0
    (tmp_path / "in" / name).parent.mkdir(parents=True)
    Image.fromarray(mask).save(tmp_path / "in" / f"{name}.png")
    views = read_masks(tmp_path / "in", procedural.views)
    expected = torch.ones(72, 96, dtype=torch.bool)
    expected[20 // STORED_PER_NET : 40 // STORED_PER_NET, 60 // STORED_PER_NET :] = False
    assert torch.equal(views[0].mask, expected)
    assert all(view.mask is None for view in views[1:])
    write_masks(views, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out" / "photos").iterdir()] == ["000.jpg.png"]
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "out" / f"{name}.png")), mask)


def test_a_pixel_is_used_only_where_all_of_it_is_white(procedural, tmp_path):
    view = procedural.views[0]
    mask = np.full(view.original_size[::-1], 255, dtype=np.uint8)
    mask[11, 21] = 0
    (tmp_path / view.name).parent.mkdir()
    Image.fromarray(mask).save(tmp_path / f"{view.name}.png")
    found = read_masks(tmp_path, [view])[0].mask
    assert (~found).nonzero().tolist() == [[5, 10]]


def test_masks_of_another_size_or_name_are_refused(procedural, tmp_path):
    with pytest.raises(InputError, match=r"expected files such as photos/000\.jpg\.png"):
        read_masks(tmp_path, procedural.views)
    (tmp_path / "photos").mkdir()
    Image.new("L", (10, 10)).save(tmp_path / "photos" / "000.jpg.png")
    with pytest.raises(InputError, match=r"is 10 x 10 pixels, photos/000\.jpg 192 x 144"):
        read_masks(tmp_path, procedural.views)
