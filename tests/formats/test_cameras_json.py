"""Reference cameras from a cameras.json, on files written here."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from dust3r_sfm.errors import InputError
from dust3r_sfm.formats.cameras_json import names_below_images, read_cameras_json, read_depth, undistort
from dust3r_sfm.geometry.lens import Lens

K = [[500.0, 0, 320], [0, 510, 240], [0, 0, 1]]
POSE = [[0.0, -1, 0, 1], [1, 0, 0, 2], [0, 0, 1, 3], [0, 0, 0, 1]]


def frame(image, **fields):
    return {"image": image, "width": 640, "height": 480, **fields}


def write(folder, *frames):
    path = folder / "cameras.json"
    path.write_text(json.dumps({"name": "scene", "frames": list(frames)}))
    return path


def test_names_are_those_of_a_model_made_from_the_image_folder(tmp_path):
    write(tmp_path, frame("images/0001.jpg"), frame("images/left/0001.jpg"), frame("images/images/0001.jpg"))
    assert [f.name for f in read_cameras_json(tmp_path)] == ["0001.jpg", "left/0001.jpg", "images/0001.jpg"]


def test_only_a_whole_leading_folder_that_all_share_is_taken_off():
    assert names_below_images(["images_2/a.jpg", "images_2/b.jpg"]) == ["images_2/a.jpg", "images_2/b.jpg"]
    assert names_below_images(["images/a.jpg", "b.jpg"]) == ["images/a.jpg", "b.jpg"]
    assert names_below_images(["./images/a.jpg", "images/b.jpg"]) == ["a.jpg", "b.jpg"]


def test_what_is_known_comes_back_and_the_rest_is_none(tmp_path):
    full = frame("images/a.jpg", K=K, cam_from_world=POSE, opencv_distortion_k1_k2_p1_p2=[0.1, 0.01, 0.001, -0.001])
    a, b = read_cameras_json(write(tmp_path, full, frame("images/b.jpg", opencv_distortion_k1_k2_p1_p2=[0, 0, 0, 0])))
    assert a.size == (640, 480)
    assert a.K.tolist() == K
    assert a.cam_from_world.tolist() == POSE
    assert a.lens == Lens("OPENCV", (0.1, 0.01, 0.001, -0.001))
    assert b.K is None
    assert b.cam_from_world is None
    assert b.lens is None
    assert read_depth(b) is None


def test_undistorted_pixels_are_those_of_the_pinhole_camera(tmp_path):
    k1, k2, p1, p2 = 0.1, -0.05, 0.002, -0.001
    write(tmp_path, frame("images/a.jpg", K=K, opencv_distortion_k1_k2_p1_p2=[k1, k2, p1, p2]))
    (a,) = read_cameras_json(tmp_path)
    x, y = torch.rand((2, 3, 7), generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.8 - 0.4
    # OpenCV's model, forward
    r2 = x * x + y * y
    radial = 1 + k1 * r2 + k2 * r2 * r2
    distorted_x = x * radial + 2 * p1 * x * y + p2 * (r2 + 2 * x * x)
    distorted_y = y * radial + p1 * (r2 + 2 * y * y) + 2 * p2 * x * y
    seen = torch.stack([500 * distorted_x + 320, 510 * distorted_y + 240], dim=-1)
    pinhole = torch.stack([500 * x + 320, 510 * y + 240], dim=-1)
    assert torch.allclose(undistort(a, seen), pinhole, atol=1e-6)


def test_pixels_whose_distortion_cannot_be_undone_are_nan(tmp_path):
    (a,) = read_cameras_json(
        write(tmp_path, frame("images/a.jpg", K=K, opencv_distortion_k1_k2_p1_p2=[0.2312, -0.7849, 0, 0]))
    )
    corner, near_middle = undistort(a, torch.tensor([[0.5, 0.5], [330.0, 250.0]]))
    assert corner.isnan().all()
    assert torch.allclose(near_middle, torch.tensor([330.0, 250.0]), atol=0.01)


def test_depth_is_in_metres_and_zero_where_unknown(tmp_path):
    values = np.zeros((480, 640), np.uint16)
    values[10, 20] = 1500
    Image.fromarray(values).save(tmp_path / "a.png")
    (a,) = read_cameras_json(write(tmp_path, frame("images/a.jpg", depth="a.png", depth_scale=1000)))
    depth = read_depth(a)
    assert depth.shape == (480, 640)
    assert depth[10, 20] == pytest.approx(1.5)
    assert depth.count_nonzero() == 1


def test_depth_of_another_size_than_its_image_is_refused(tmp_path):
    Image.fromarray(np.zeros((48, 64), np.uint16)).save(tmp_path / "a.png")
    (a,) = read_cameras_json(write(tmp_path, frame("images/a.jpg", depth="a.png")))
    with pytest.raises(InputError, match=r"shape \(48, 64\)"):
        read_depth(a)


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"frames": [{"image": "images/a.jpg"}]}', '{"frames": 3}', '{"frames": [{"image": 3}]}']
    + [json.dumps({"frames": [frame("a.jpg", K=[[1, 2], [3, 4]])]})]
    + [json.dumps({"frames": [frame("a.jpg", K=[[1, 2], [3]])]})]
    + [json.dumps({"frames": [frame("a.jpg"), frame("a.jpg")]})],
)
def test_a_file_that_is_no_cameras_json_is_named(tmp_path, content):
    path = tmp_path / "cameras.json"
    path.write_text(content)
    with pytest.raises(InputError, match="cameras.json"):
        read_cameras_json(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match="there is no"):
        read_cameras_json(tmp_path)
