import pytest
import torch

from dust3r_sfm.geometry.camera import K_from_focal, pixel_grid, project, split_rotation, transform_K, unproject
from dust3r_sfm.geometry.transforms import transform_points


def random_intrinsics(batch, dtype=torch.float64):
    K = torch.eye(3, dtype=dtype).repeat(*batch, 1, 1)
    K[..., 0, 0] = 100 + 50 * torch.rand(batch, dtype=dtype)
    K[..., 1, 1] = 100 + 50 * torch.rand(batch, dtype=dtype)
    K[..., 0, 1] = torch.rand(batch, dtype=dtype)
    K[..., :2, 2] = 30 + 10 * torch.rand(*batch, 2, dtype=dtype)
    return K


def test_the_first_pixel_is_half_a_pixel_from_the_corner():
    grid = pixel_grid(3, 5)
    assert grid.shape == (3, 5, 2)
    assert grid[0, 0].tolist() == [0.5, 0.5]
    assert grid[2, 4].tolist() == [4.5, 2.5]


@pytest.mark.parametrize("batch", [(), (1,), (2, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_unprojected_pixels_project_onto_their_centers(batch, dtype):
    torch.manual_seed(0)
    K, depth = random_intrinsics(batch, dtype), 1 + torch.rand(*batch, 6, 8, dtype=dtype)
    points = unproject(K, depth)
    assert points.dtype == dtype
    torch.testing.assert_close(points[..., 2], depth)
    expected = pixel_grid(6, 8, dtype=dtype).flatten(0, 1).expand(*batch, 48, 2)
    torch.testing.assert_close(project(K, points.flatten(-3, -2)), expected)


def test_a_point_to_the_right_and_below_is_at_larger_x_and_y():
    K = K_from_focal(torch.tensor(100.0), torch.tensor([32.0, 24.0]))
    assert project(K, torch.tensor([[0.1, 0.2, 1.0]]))[0].tolist() == pytest.approx([42.0, 44.0])


def test_one_camera_projects_a_batch_of_points():
    assert project(random_intrinsics(()), torch.rand(4, 7, 3, dtype=torch.float64) + 1).shape == (4, 7, 2)


@pytest.mark.parametrize("batch", [(), (3,)])
def test_intrinsics_from_a_focal_share_one_principal_point(batch):
    K = K_from_focal(torch.full(batch, 50.0), torch.tensor([8.0, 6.0]))
    assert K.shape == (*batch, 3, 3)
    assert K[..., 1, 1].eq(50).all()
    assert K[..., 0, 2].eq(8).all()


def test_scaled_and_cropped_intrinsics_project_onto_scaled_and_cropped_pixels():
    torch.manual_seed(0)
    K, points = random_intrinsics(()), torch.rand(20, 3, dtype=torch.float64) + 1
    affine = torch.tensor([[0.5, 0, -3], [0, 0.25, 2], [0, 0, 1]], dtype=torch.float64)
    expected = project(K, points) * torch.tensor([0.5, 0.25]) + torch.tensor([-3.0, 2.0])
    torch.testing.assert_close(project(transform_K(K, affine), points), expected)


def quarter_turn(turns, scale_x, scale_y):
    c, s = [(1, 0), (0, 1), (-1, 0), (0, -1)][turns]
    return torch.tensor([[scale_x * c, -scale_x * s, 40.0], [scale_y * s, scale_y * c, -7.0], [0, 0, 1]]).double()


@pytest.mark.parametrize("turns", [0, 1, 2, 3])
def test_a_turned_image_has_a_turned_camera_with_positive_focals(turns):
    torch.manual_seed(0)
    K_net, img_from_net = random_intrinsics(()), quarter_turn(turns, 2.0, 3.0)
    K_net[0, 1] = 0
    points = torch.rand(20, 3, dtype=torch.float64) + 1
    K_img, imgcam_from_netcam = split_rotation(img_from_net, K_net)
    pixels = project(K_net, points) @ img_from_net[:2, :2].mT + img_from_net[:2, 2]
    torch.testing.assert_close(project(K_img, transform_points(imgcam_from_netcam, points)), pixels)
    assert K_img.diagonal().gt(0).all()
    torch.testing.assert_close(K_img, K_img.triu())
    torch.testing.assert_close(torch.det(imgcam_from_netcam), torch.ones(()).double())


def test_turns_of_a_batch_are_split_one_by_one():
    img_from_net = torch.stack([quarter_turn(turns, 2.0, 2.0) for turns in range(4)])
    K_net = random_intrinsics((4,), torch.float32)
    K_img, imgcam_from_netcam = split_rotation(img_from_net, K_net)
    assert K_img.dtype == torch.float64
    for i in range(4):
        torch.testing.assert_close(K_img[i], split_rotation(img_from_net[i], K_net[i])[0])
        torch.testing.assert_close(imgcam_from_netcam[i], split_rotation(img_from_net[i], K_net[i])[1])


@pytest.mark.parametrize("linear", [[[-1.0, 0.0], [0.0, 1.0]], [[1.0, 0.5], [0.0, 1.0]], [[0.0, 0.0], [0.0, 1.0]]])
def test_mirrored_sheared_and_flat_maps_have_no_camera(linear):
    affine = torch.eye(3)
    affine[:2, :2] = torch.tensor(linear)
    with pytest.raises(ValueError, match="mirror or shear"):
        split_rotation(affine, torch.eye(3))
