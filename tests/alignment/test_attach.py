"""Models put into the frame of an aligned scene, and its other images put beside them."""

import dataclasses

import torch
from observed import observed_scene
from procedural import make_scene

from dust3r_sfm.alignment.attach import attached, in_frame_of
from dust3r_sfm.geometry.transforms import inverse, rotation_from_rotvec
from dust3r_sfm.scene import Scene


def truth(num_views=6):
    return observed_scene(make_scene(num_views, (24, 32), pairs=[]), num_points=50)


def moved(scene, scale, seed=0):
    """The scene in another frame: x_new = scale R x + t."""
    generator = torch.Generator().manual_seed(seed)
    rotation = rotation_from_rotvec(torch.randn(3, generator=generator).double())
    shift = torch.randn(3, generator=generator).double()
    world_from_cam = inverse(scene.cam_from_world.double())
    world_from_cam[:, :3, :3] = rotation @ world_from_cam[:, :3, :3]
    world_from_cam[:, :3, 3] = scale * world_from_cam[:, :3, 3] @ rotation.T + shift
    points = scale * scene.tracks.points_in_world.double() @ rotation.T + shift
    return dataclasses.replace(
        scene,
        cam_from_world=inverse(world_from_cam),
        depth=tuple(scale * depth for depth in scene.depth),
        tracks=dataclasses.replace(scene.tracks, points_in_world=points.float()),
    )


def subset(scene, images):
    """Some images of a scene, without tracks."""
    fields = {name: tuple(getattr(scene, name)[i] for i in images) for name in ("names", "depth", "confidence")}
    fields |= {name: getattr(scene, name)[images] for name in ("K", "cam_from_world", "net_from_img")}
    return Scene(**fields, original_sizes=tuple(scene.original_sizes[i] for i in images))


def test_a_model_comes_into_the_frame_of_the_alignment_with_depth_and_points():
    aligned = truth()
    back = in_frame_of(moved(aligned, 3.0), aligned)
    torch.testing.assert_close(back.cam_from_world, aligned.cam_from_world.double(), atol=1e-4, rtol=0)
    torch.testing.assert_close(back.depth[2], aligned.depth[2], rtol=1e-4, atol=0)
    torch.testing.assert_close(back.tracks.points_in_world, aligned.tracks.points_in_world, atol=1e-4, rtol=0)


def test_one_image_aligned_wrongly_does_not_pull_the_frame():
    aligned = truth()
    poses = aligned.cam_from_world.clone()
    poses[1, :3, 3] += 2.0
    back = in_frame_of(moved(aligned, 0.5), dataclasses.replace(aligned, cam_from_world=poses))
    others = [0, 2, 3, 4, 5]
    torch.testing.assert_close(back.cam_from_world[others], aligned.cam_from_world.double()[others], atol=0.05, rtol=0)


def test_two_images_leave_the_model_in_its_own_frame():
    aligned = truth(2)
    model = moved(aligned, 2.0)
    assert in_frame_of(model, aligned) is model


def test_images_that_only_the_alignment_has_keep_their_place_beside_their_neighbours():
    aligned = truth()
    model = moved(aligned, 4.0)
    whole = attached(subset(model, [0, 1, 3, 4]), aligned)
    order = [model.names.index(name) for name in whole.names]
    assert whole.names[:4] == tuple(model.names[i] for i in (0, 1, 3, 4))
    assert sorted(order) == list(range(6))
    torch.testing.assert_close(whole.cam_from_world, model.cam_from_world[order], atol=1e-4, rtol=0)
    torch.testing.assert_close(whole.depth[4], model.depth[order[4]], rtol=1e-4, atol=0)
    assert attached(model, aligned) is model
