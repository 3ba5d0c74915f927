"""Figures of pairwise prediction, on procedural pairs and networks whose errors are known."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from procedural import make_scene

from dust3r_sfm import evaluate_pairs as stage
from dust3r_sfm.errors import InputError
from dust3r_sfm.evaluate_pairs import evaluate_pairs, load_dev_pairs
from dust3r_sfm.formats.cameras_json import ReferenceFrame
from dust3r_sfm.formats.dev_pairs import DevView, make_dev_pairs, make_dev_view
from dust3r_sfm.geometry.camera import pixel_grid, project
from dust3r_sfm.geometry.lens import Lens
from dust3r_sfm.models.dust3r import Dust3r, Dust3rConfig, Tokens
from dust3r_sfm.pairs import Pair, PairPrediction
from dust3r_sfm.views import View

SIZE = (48, 64)
TINY = Dust3rConfig(
    image_size=64, enc_embed_dim=16, enc_depth=1, enc_num_heads=1, dec_embed_dim=16, dec_depth=1, dec_num_heads=1
)


class Oracle(Dust3r):
    """A network that knows the scenes: it recognises photos, and predicts what `change` makes of the truth."""

    def __init__(self, scenes, change=lambda prediction, pair: prediction):
        super().__init__(TINY)
        self.views = [(scene, view) for scene in scenes for view in scene.views]
        self.change = change
        self.images_encoded = 0

    def encode(self, image):
        self.images_encoded += len(image)
        stored = torch.stack([view.normalized() for _, view in self.views])
        index = (image[:, None] == stored).flatten(2).all(dim=-1).float().argmax(dim=1)
        return Tokens(index[:, None, None].float(), (1, 1))

    def decode(self, tokens0, tokens1):
        indices = zip(tokens0.features.flatten().tolist(), tokens1.features.flatten().tolist(), strict=True)
        predictions = [self._predict(*(self.views[int(i)] for i in pair)) for pair in indices]
        fields = (field.name for field in dataclasses.fields(PairPrediction))
        return PairPrediction(*(torch.stack([getattr(p, field) for p in predictions]) for field in fields))

    def _predict(self, view0, view1):
        pair = Pair(view0[1].name, view1[1].name)
        if view0[0] is view1[0]:
            return self.change(view0[0].predictions[pair], pair)
        noise = torch.randn((2, *SIZE, 3), generator=torch.Generator().manual_seed(0))
        return PairPrediction(noise[0], torch.ones(SIZE), noise[1], torch.ones(SIZE))


@pytest.fixture(scope="module")
def scenes():
    return [make_scene(4, SIZE, seed=seed) for seed in (0, 1)]


@pytest.fixture(scope="module")
def dev_pairs(scenes):
    views, pairs = [], []
    for number, scene in enumerate(scenes):
        n, start = len(scene.views), len(views)
        for i, view in enumerate(scene.views):
            depth = scene.depth[i] if number == 0 else None
            camera = {"K": scene.K[i], "cam_from_world": scene.cam_from_world[i]}
            views.append(DevView(scene=f"s{number}", view=view, keypoints=pixel_grid(*SIZE), depth=depth, **camera))
        pairs += [(start + i, start + j) for i in range(n) for j in range(n) if i != j and abs(i - j) < 3]
    return make_dev_pairs(views, pairs)


def turn_about_y(deg):
    c, s = math.cos(math.radians(deg)), math.sin(math.radians(deg))
    return torch.tensor([[c, 0, s], [0, 1, 0], [-s, 0, c]])


def test_a_perfect_network_scores_100(scenes, dev_pairs):
    report = evaluate_pairs(Oracle(scenes), dev_pairs, "cpu")
    for scores in (*report.scenes, report.total):
        one_way = (scores.reference_focal, scores.both_known, scores.own_focal)
        for poses in (*one_way, scores.both_ways, scores.own_focal_both_ways):
            assert (poses.rra15, poses.rta15) == (1, 1)
            assert poses.maa30 > 0.97
        assert scores.focal_error < 0.01
    assert [scores.scene for scores in report.scenes] == ["s0", "s1"]
    assert [scores.num_pairs for scores in report.scenes] == [10, 10]
    assert report.scenes[0].depth_error < 1e-3
    assert report.scenes[1].depth_error is None
    assert report.calibration.separation == report.calibration.separation_weaker_image == 1


def test_an_image_is_encoded_once_and_pairs_across_scenes_are_of_two_scenes(scenes, dev_pairs):
    oracle = Oracle(scenes)
    evaluate_pairs(oracle, dev_pairs, "cpu", batch_size=3)
    assert oracle.images_encoded == len(dev_pairs.views)
    assert len(dev_pairs.pairs_across) == len(dev_pairs.pairs)
    assert all(dev_pairs.views[i].scene != dev_pairs.views[j].scene for i, j in dev_pairs.pairs_across)


@pytest.mark.parametrize("deg", [10.0, 14.5, 15.5, 40.0])
def test_pointmaps_turned_by_a_known_angle_give_the_known_rotation_error(scenes, dev_pairs, deg):
    def turned(p, pair):
        return dataclasses.replace(p, pointmap1_in_cam0=p.pointmap1_in_cam0 @ turn_about_y(deg).mT)

    scores = evaluate_pairs(Oracle(scenes, turned), dev_pairs, "cpu").total
    assert scores.reference_focal.median_rotation_deg == pytest.approx(deg, abs=0.3)
    assert scores.reference_focal.rra15 == (deg < 15)
    # The turn is about camera 0's centre: camera 1 sees it in the same direction as before.
    assert scores.reference_focal.rta15 == 1
    thresholds = sum(deg < t for t in range(1, 31))
    assert scores.reference_focal.maa30 == pytest.approx(thresholds / 30, abs=0.04)


def test_swapped_and_mirrored_conventions_fail(scenes, dev_pairs):
    def swapped_images(p, pair):
        return PairPrediction(p.pointmap1_in_cam0, p.confidence1, p.pointmap0_in_cam0, p.confidence0)

    def mirrored(p, pair):
        return dataclasses.replace(p, pointmap1_in_cam0=p.pointmap1_in_cam0 * torch.tensor([-1.0, 1, 1]))

    def in_own_frame(p, pair):
        scene = scenes[0] if scenes[0].predictions.get(pair) is p else scenes[1]
        return dataclasses.replace(p, pointmap1_in_cam0=scene.predictions[pair.reversed()].pointmap0_in_cam0)

    for wrong in (swapped_images, mirrored, in_own_frame):
        poses = evaluate_pairs(Oracle(scenes, wrong), dev_pairs, "cpu").total.reference_focal
        assert min(poses.rra15, poses.rta15) < 0.3
        assert poses.maa30 < 0.3


def test_flattened_pointmaps_give_the_known_focal_error(scenes, dev_pairs):
    def narrow(p, pair):
        return dataclasses.replace(p, pointmap0_in_cam0=p.pointmap0_in_cam0 * torch.tensor([1.0, 1, 1.25]))

    assert evaluate_pairs(Oracle(scenes, narrow), dev_pairs, "cpu").total.focal_error == pytest.approx(0.25, abs=0.01)


def test_a_network_that_takes_the_lens_for_another_finds_poses_where_both_cameras_are_known(scenes, dev_pairs):
    def too_deep(p, pair):
        stretch = torch.tensor([1.0, 1, 1.5])
        pointmaps = {f"pointmap{k}_in_cam0": getattr(p, f"pointmap{k}_in_cam0") * stretch for k in (0, 1)}
        return dataclasses.replace(p, **pointmaps)

    report = evaluate_pairs(Oracle(scenes, too_deep), dev_pairs, "cpu")
    assert report.total.both_known.maa30 > 0.97
    assert report.total.reference_focal.maa30 < 0.9
    assert report.figures()["both_maa30"] == report.total.both_known.maa30


def forward(pair):
    return pair.name0 < pair.name1


def test_a_turn_in_one_direction_counts_half_both_ways(scenes, dev_pairs):
    def forward_pairs_turned(p, pair):
        turn = turn_about_y(20.0 if forward(pair) else 0.0)
        return dataclasses.replace(p, pointmap1_in_cam0=p.pointmap1_in_cam0 @ turn.mT)

    report = evaluate_pairs(Oracle(scenes, forward_pairs_turned), dev_pairs, "cpu")
    assert report.total.both_known.rra15 == report.total.own_focal.rra15 == 0.5
    for poses in (report.total.both_ways, report.total.own_focal_both_ways):
        assert poses.median_rotation_deg == pytest.approx(10, abs=0.3)
        assert poses.rra15 == poses.rta15 == 1
    figures = report.figures()
    assert figures["both_ways_maa30"] == report.total.both_ways.maa30
    assert figures["own_both_ways_maa30"] == report.total.own_focal_both_ways.maa30


def test_a_direction_without_a_pose_leaves_the_other(scenes, dev_pairs):
    def forward_pairs_fail(p, pair):
        factor = torch.nan if forward(pair) else 1.0
        return dataclasses.replace(p, pointmap1_in_cam0=p.pointmap1_in_cam0 * factor)

    scores = evaluate_pairs(Oracle(scenes, forward_pairs_fail), dev_pairs, "cpu").total
    assert scores.both_known.rra15 == scores.own_focal.rra15 == 0.5
    assert min(scores.both_ways.maa30, scores.own_focal_both_ways.maa30) > 0.97


def test_both_ways_listens_to_pixels_of_all_confidences(scenes, dev_pairs):
    def sure_part_turned(p, pair):
        confidence1 = torch.ones(SIZE)
        confidence1[:, :20] = 10.0  # five sixteenths of the image: most of its more confident half
        turned = p.pointmap1_in_cam0 @ turn_about_y(20.0 if forward(pair) else -20.0).mT
        sure = (confidence1 > 1)[..., None]
        return dataclasses.replace(
            p, pointmap1_in_cam0=torch.where(sure, turned, p.pointmap1_in_cam0), confidence1=confidence1
        )

    scores = evaluate_pairs(Oracle(scenes, sure_part_turned), dev_pairs, "cpu").total
    assert scores.both_known.median_rotation_deg == pytest.approx(20, abs=0.5)
    assert scores.both_ways.median_rotation_deg < 1


def test_depth_is_compared_after_one_scale_for_each_image(scenes, dev_pairs):
    def left_part_too_far(p, pair):
        depth_factor = torch.ones(SIZE)
        depth_factor[:, :24] = 1.5
        sure = torch.where(depth_factor > 1, 1.0, 10.0)
        return dataclasses.replace(
            p, pointmap0_in_cam0=7 * depth_factor[..., None] * p.pointmap0_in_cam0, confidence0=sure
        )

    report = evaluate_pairs(Oracle(scenes, left_part_too_far), dev_pairs, "cpu")
    assert report.scenes[0].depth_error < 1e-3
    assert report.calibration.confident_half_depth < 1e-3
    # Three quarters of the less confident half are 1.5 times too far.
    assert report.calibration.other_half_depth == pytest.approx(0.5, abs=1e-3)


def test_confidence_that_tells_good_from_bad_pairs_shows(scenes, dev_pairs):
    def forward_pairs_are_bad_and_unsure(p, pair):
        if pair.name0 > pair.name1:
            return p
        bad = p.pointmap1_in_cam0 @ turn_about_y(25).mT
        return PairPrediction(p.pointmap0_in_cam0, p.confidence0 / 2, bad, p.confidence1 / 2)

    calibration = evaluate_pairs(Oracle(scenes, forward_pairs_are_bad_and_unsure), dev_pairs, "cpu").calibration
    assert calibration.confident_half_deg < 3
    assert calibration.other_half_deg == pytest.approx(25, abs=0.5)


def test_confidence_of_both_directions_tells_good_from_bad_pairs(scenes, dev_pairs):
    def views_apart_are_bad_and_one_direction_says_so(p, pair):
        are_apart = sorted(pair) in (["photos/000.jpg", "photos/002.jpg"], ["photos/001.jpg", "photos/003.jpg"])
        bad = p.pointmap1_in_cam0 @ turn_about_y(25.0 if forward(pair) else -25.0).mT
        confidence = torch.full(SIZE, 2.0 if are_apart and not forward(pair) else 10.0)
        pointmap1 = bad if are_apart else p.pointmap1_in_cam0
        return PairPrediction(p.pointmap0_in_cam0, confidence, pointmap1, confidence)

    network = Oracle(scenes, views_apart_are_bad_and_one_direction_says_so)
    calibration = evaluate_pairs(network, dev_pairs, "cpu").calibration
    assert calibration.confident_half_both_ways_deg < 3
    assert calibration.other_half_both_ways_deg == pytest.approx(25, abs=1)
    # one direction alone does not know of all bad pairs
    assert calibration.other_half_deg < 3


def test_pixels_of_unknown_direction_are_left_out(scenes, dev_pairs):
    views = [dataclasses.replace(view, keypoints=view.keypoints.clone()) for view in dev_pairs.views]
    for view in views:
        view.keypoints[:10] = torch.nan
    report = evaluate_pairs(Oracle(scenes), dataclasses.replace(dev_pairs, views=tuple(views)), "cpu")
    assert report.total.reference_focal.maa30 > 0.97


def test_predictions_that_are_not_finite_fail_and_the_figures_stay_json(scenes, dev_pairs):
    def nothing(p, pair):
        nan = torch.full_like(p.pointmap0_in_cam0, torch.nan)
        return PairPrediction(nan, p.confidence0, nan, p.confidence1)

    report = evaluate_pairs(Oracle(scenes, nothing), dev_pairs, "cpu")
    assert report.total.reference_focal.rra15 == report.total.own_focal.rta15 == 0
    assert report.total.both_ways.rra15 == report.total.own_focal_both_ways.rta15 == 0
    figures = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert figures["total"]["reference_focal"]["median_rotation_deg"] is None
    assert figures["total"]["focal_error"] is None
    assert "inf" in report.table()


def test_evaluation_leaves_a_network_in_training_as_it_was(dev_pairs):
    torch.manual_seed(0)
    model = Dust3r(TINY).train()
    first, second = (evaluate_pairs(model, dev_pairs, "cpu").to_dict() for _ in range(2))
    first.pop("seconds")
    second.pop("seconds")
    assert first == second
    assert model.training
    image = dev_pairs.views[0].view.normalized()[None]
    model(image, image).pointmap1_in_cam0.sum().backward()
    assert model.patch_embed.proj.weight.grad is not None


def write_scene(folder, scene):
    """Stored files are twice the size of the network's images."""
    (folder / "images").mkdir(parents=True)
    (folder / "depth").mkdir()
    frames = []
    for i, view in enumerate(scene.views):
        stored = view.image.numpy().repeat(2, axis=0).repeat(2, axis=1)
        Image.fromarray(stored).save(folder / f"images/{i}.png")
        millimetres = (scene.depth[i].numpy() * 1000).round().astype(np.uint16).repeat(2, axis=0).repeat(2, axis=1)
        Image.fromarray(millimetres).save(folder / f"depth/{i}.png")
        K = torch.diag(torch.tensor([2.0, 2, 1])) @ scene.K[i]
        frames.append({"image": f"images/{i}.png", "width": 2 * SIZE[1], "height": 2 * SIZE[0], "K": K.tolist()})
        frames[-1] |= {"cam_from_world": scene.cam_from_world[i].tolist()}
        frames[-1] |= {"depth": f"depth/{i}.png", "depth_scale": 1000}
    (folder / "cameras.json").write_text(json.dumps({"frames": frames}))


@pytest.fixture
def scenes_dir(scenes, tmp_path):
    for number, scene in enumerate(scenes):
        write_scene(tmp_path / f"s{number}", scene)
    pairs = {f"s{number}": [["0.png", "1.png"], ["2.png", "0.png"]] for number in range(2)}
    (tmp_path / "pairs_within_60deg.json").write_text(json.dumps(pairs))
    return tmp_path


def test_a_folder_of_scenes_gives_cameras_and_depth_of_the_network_images(scenes, scenes_dir):
    dev = load_dev_pairs(scenes_dir, size=SIZE[1])
    assert [(v.scene, v.view.name) for v in dev.views] == [(f"s{s}", f"{i}.png") for s in range(2) for i in range(3)]
    assert dev.pairs == ((0, 1), (2, 0), (3, 4), (5, 3))
    assert len(dev.pairs_across) == 4
    for k, view in enumerate(dev.views):
        scene, i = scenes[k // 3], k % 3
        assert view.view.size == SIZE
        assert torch.allclose(view.K, scene.K[i], atol=1e-4)
        assert torch.allclose(view.cam_from_world.float(), scene.cam_from_world[i])
        assert torch.allclose(view.keypoints, pixel_grid(*SIZE), atol=1e-4)
        assert torch.allclose(view.depth, scene.depth[i], atol=6e-4)


def test_the_command_prints_a_table_and_writes_the_figures(scenes_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Dust3r, "from_pretrained", classmethod(lambda cls, source: Dust3r(TINY)))
    stage.main(**vars(stage._parse(["--scenes_dir", str(scenes_dir), "--json", str(tmp_path / "figures.json")])))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:5]] == ["s0", "s1", "total"]
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["total"]["num_pairs"] == 4
    assert set(figures["seconds"]) == {"network", "poses", "total"}


def test_a_photo_turned_by_its_exif_tag_has_the_camera_turned_with_it(scenes):
    """The network image is the stored one turned by a quarter: both cameras must see a point at the same pixel."""
    height, width = 96, 128  # of the stored file
    net_from_img = torch.tensor([[0, -0.5, height / 2], [0.5, 0, 0], [0, 0, 1]], dtype=torch.float64)
    image = torch.zeros((width // 2, height // 2, 3), dtype=torch.uint8)
    view = View(name="a.jpg", image=image, original_size=(width, height), net_from_img=net_from_img)
    K, pose = torch.tensor([[100.0, 0, 60], [0, 110, 50], [0, 0, 1]]).double(), scenes[0].cam_from_world[0].double()
    dev = make_dev_view(view, ReferenceFrame(name="a.jpg", size=(width, height), K=K, cam_from_world=pose), "s")
    points = scenes[0].points_in_world[0].reshape(-1, 3)[::100].double()
    stored, turned = (
        project(camera, points @ cam_from_world[:3, :3].mT + cam_from_world[:3, 3])
        for camera, cam_from_world in ((K, pose), (dev.K.double(), dev.cam_from_world))
    )
    assert torch.allclose(stored @ net_from_img[:2, :2].mT + net_from_img[:2, 2], turned, atol=1e-3)


def test_lens_distortion_is_taken_out_of_the_keypoints(scenes):
    view = scenes[0].views[0]
    K = torch.linalg.inv(view.net_from_img) @ scenes[0].K[0].double()
    frame = ReferenceFrame(
        name="a",
        size=view.original_size,
        K=K,
        cam_from_world=torch.eye(4).double(),
        lens=Lens("OPENCV", (0.2, 0.0, 0.0, 0.0)),
    )
    dev = make_dev_view(view, frame, "s")
    normalized = (dev.keypoints - scenes[0].K[0, :2, 2]) / scenes[0].K[0].diagonal()[:2]
    radius = normalized.norm(dim=-1, keepdim=True)
    distorted = normalized * (1 + 0.2 * radius**2) * scenes[0].K[0].diagonal()[:2] + scenes[0].K[0, :2, 2]
    assert torch.allclose(distorted, pixel_grid(*SIZE), atol=1e-3)
    assert (dev.keypoints - pixel_grid(*SIZE)).norm(dim=-1).max() > 1


def test_mistakes_have_their_sentence(scenes_dir, tmp_path, dev_pairs):
    with pytest.raises(InputError, match="no pairs_within_60deg.json"):
        load_dev_pairs(tmp_path / "s0", 64)
    (scenes_dir / "pairs_within_60deg.json").write_text(json.dumps({"s0": [["0.png", "9.png"]]}))
    with pytest.raises(InputError, match="lacks 1 images .* first 9.png"):
        load_dev_pairs(scenes_dir, 64)
    (scenes_dir / "pairs_within_60deg.json").write_text("{")
    with pytest.raises(InputError, match="is not JSON"):
        load_dev_pairs(scenes_dir, 64)
    with pytest.raises(InputError, match="expected K, a pose"):
        make_dev_view(dev_pairs.views[0].view, ReferenceFrame(name="a", size=(1, 1)), "s0")
    with pytest.raises(InputError, match="no pairs to evaluate"):
        evaluate_pairs(Dust3r(TINY), dataclasses.replace(dev_pairs, pairs=()), "cpu")
