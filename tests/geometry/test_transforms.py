import math

import pytest
import torch
from scipy.spatial.transform import Rotation

from dust3r_sfm.geometry import transforms as tf

BATCHES = [(), (1,), (2, 3)]
DTYPES = [torch.float32, torch.float64]


def random_rotvec(batch, dtype=torch.float64, seed=0):
    return torch.randn(*batch, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_inverse_undoes_rigid_transforms_and_similarities(batch, dtype, scale):
    target_from_source = tf.rigid_transform(
        scale * tf.rotation_from_rotvec(random_rotvec(batch, dtype)), random_rotvec(batch, dtype, 1)
    )
    product = tf.inverse(target_from_source) @ target_from_source
    torch.testing.assert_close(product, torch.eye(4, dtype=dtype).expand(*batch, 4, 4), atol=1e-5, rtol=0)


@pytest.mark.parametrize("batch", BATCHES)
def test_composed_transforms_act_one_after_the_other(batch):
    a = tf.rigid_transform(tf.rotation_from_rotvec(random_rotvec(batch, seed=1)), random_rotvec(batch, seed=2))
    b = tf.rigid_transform(tf.rotation_from_rotvec(random_rotvec(batch, seed=3)), random_rotvec(batch, seed=4))
    points = random_rotvec((*batch, 5), seed=5)
    torch.testing.assert_close(
        tf.transform_points(a @ b, points), tf.transform_points(a, tf.transform_points(b, points))
    )


def test_a_camera_sees_its_center_at_its_origin():
    cam_from_world = tf.rigid_transform(tf.rotation_from_rotvec(random_rotvec(())), random_rotvec((), seed=1))
    center = tf.camera_center(cam_from_world)
    torch.testing.assert_close(tf.transform_points(cam_from_world, center[None]), torch.zeros(1, 3).double())


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rotations_equal_those_of_scipy(batch, dtype):
    rotvec = random_rotvec(batch, dtype)
    expected = Rotation.from_rotvec(rotvec.reshape(-1, 3).double().numpy())
    rotation = tf.rotation_from_rotvec(rotvec)
    assert rotation.dtype == dtype
    torch.testing.assert_close(
        rotation.reshape(-1, 3, 3).double(), torch.tensor(expected.as_matrix()), atol=1e-5, rtol=0
    )
    wxyz = torch.tensor(expected.as_quat(canonical=True, scalar_first=True))
    torch.testing.assert_close(tf.quaternion_from_rotation(rotation).reshape(-1, 4).double(), wxyz, atol=1e-5, rtol=0)
    torch.testing.assert_close(
        tf.rotation_from_quaternion(5 * wxyz).to(dtype), rotation.reshape(-1, 3, 3), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("angle", [0.0, 1e-5, 0.5, 1.2e-3, math.pi - 1e-4, math.pi])
@pytest.mark.parametrize("axis", [[1.0, 0, 0], [0, -1.0, 0], [0, 0, 1.0], [0.6, 0.0, -0.8]])
def test_rotation_vectors_and_angles_survive_the_way_through_matrices(angle, axis):
    rotvec = angle * torch.tensor(axis, dtype=torch.float64)
    rotation = tf.rotation_from_rotvec(rotvec)
    again = tf.rotation_from_rotvec(tf.rotvec_from_rotation(rotation))
    torch.testing.assert_close(again, rotation, atol=1e-12, rtol=0)
    eye = torch.eye(3).double()
    assert tf.rotation_angle_deg(eye, rotation).item() == pytest.approx(math.degrees(angle), abs=1e-5)
    assert torch.linalg.vector_norm(tf.rotvec_from_rotation(rotation)).item() == pytest.approx(angle, abs=1e-7)


def test_the_rotation_vector_has_exact_gradients_at_zero_and_beyond():
    for length in (0.0, 1e-4, 1e-2, 1.0):
        rotvec = (length * torch.tensor([0.6, 0.0, -0.8], dtype=torch.float64)).requires_grad_()
        assert torch.autograd.gradcheck(tf.rotation_from_rotvec, rotvec)
