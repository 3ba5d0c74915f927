"""The loop on a tiny network: it learns, stops, saves, resumes, and several processes stay one network."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch
from procedural import make_scene
from torch.utils._python_dispatch import TorchDispatchMode

from dust3r_sfm.depth_views import DepthView
from dust3r_sfm.models.dust3r import Dust3r, Dust3rConfig
from dust3r_sfm.pairs import PairPrediction
from dust3r_sfm.training.batches import Source, make_batch
from dust3r_sfm.training.config import LoopConfig, learning_rate
from dust3r_sfm.training.datasets import make_scene_pairs
from dust3r_sfm.training.loop import Trainer, load_state_file
from dust3r_sfm.training.losses import confidence_loss, regression_error
from dust3r_sfm.training.step import objective
from dust3r_sfm.training.world import Dice

TINY = Dust3rConfig(
    image_size=64, enc_embed_dim=32, enc_depth=2, enc_num_heads=2, dec_embed_dim=32, dec_depth=2, dec_num_heads=2
)
SHORT = {
    "batch": 2, "heights": (32,), "width": 48, "easy_heights": (32,), "easy_width": 32, "samples": 1,
    "warmup_steps": 5, "minutes": 30.0, "log_steps": 5,
}  # fmt: skip
pytestmark = pytest.mark.usefixtures("fast_render")


def trainer(textures, **options):
    torch.manual_seed(0)
    return Trainer(Dust3r(TINY), Source(textures), LoopConfig(**SHORT | options))


def run(trainer):
    """Trains; the steps at which it saved, and the lines it logged."""
    saves, lines = [], []
    trainer.train(lambda t: saves.append(t.optimizer.step_count), lines.append)
    return saves, lines


def test_a_tiny_network_learns(kernel, textures):
    if kernel is None:
        pytest.skip("no g++: minutes instead of seconds")
    run_ = trainer(textures, batch=3, max_steps=50, easy_share=0.0, learning_rate=4e-3)
    saves, lines = run(run_)
    assert saves == [50]
    assert len(lines) == len(run_.history) == 10
    errors = [row["error0"] + row["error1"] for row in run_.history]
    assert sum(errors[-3:]) / 3 < 0.6 * errors[0]
    assert "error" in lines[0]
    assert run_.pairs_seen == run_.history[-1]["pairs"] == 150
    assert all(row["pairs_per_second"] > 0 for row in run_.history)


def test_both_directions_of_a_pair_are_trained(textures):
    batch = make_batch(Dice("cpu", 1), 3, (32, 48), Source(textures), LoopConfig(samples=1))
    assert batch.images.shape == (3, 2, 3, 32, 48)
    assert batch.images.min() >= -1
    assert batch.images.max() <= 1
    assert batch.truth.shape == (6, 2, 32, 48, 3)
    assert batch.targets.shape == (6, 6)
    assert torch.equal(batch.valid[:3], batch.valid[3:].flip(1))
    # the first view of either direction is in its own camera: the depth rises along each pixel's fixed ray
    for direction in range(6):
        points, valid = batch.truth[direction, 0], batch.valid[direction, 0]
        slope = torch.where(valid, points[..., 0] / points[..., 2], torch.nan)  # of the sky there is none
        column = slope.nanmedian(0).values.expand_as(slope)
        assert torch.allclose(slope[valid], column[valid], atol=1e-4)
    # from the second camera, which stands at its centre, the second view's points lie along its own rays
    for direction in range(6):
        points, valid = batch.truth[direction, 1] - batch.centers[direction], batch.valid[direction, 1]
        if valid[4].sum() > 4:  # the rays of a row lie in a plane
            rays = points[4][valid[4]].double()
            assert torch.linalg.svdvals(rays / rays.norm(dim=-1, keepdim=True))[2] < 1e-3
    # both directions hold the same points: a rigid motion apart
    for k in range(3):
        forth, back = batch.truth[k][batch.valid[k]][::37], batch.truth[k + 3].flip(0)[batch.valid[k]][::37]
        distances = [torch.cdist(points.double(), points.double()) for points in (forth, back)]
        assert torch.allclose(*distances, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "options", [{"portrait": 1.0}, {"pose": 0.5, "log_space": True}, {"matching": 0.0}, {"muon": False}, {"samples": 2}]
)
def test_other_ways_to_train_run_too(textures, options):
    run_ = trainer(textures, max_steps=2, log_steps=1, **options)
    run(run_)
    assert run_.optimizer.parameters.isfinite().all()
    assert (run_.history[0]["matching"] == 0) == ("matching" in options)


def test_small_images_come_in_larger_batches_and_each_shape_in_its_turn(textures):
    run_ = trainer(textures, heights=(64, 96, 48), width=96, easy_heights=(32,), easy_width=32)
    easy, full = run_.steps()
    assert {size: step.batch for size, step in easy.items()} == {(32, 32): 12}
    batches = {(64, 96): 2, (96, 64): 2, (96, 96): 1, (48, 96): 2, (96, 48): 2}
    assert {size: step.batch for size, step in full.items()} == batches
    run_.chooser = torch.Generator().manual_seed(0)
    assert run_._choose([easy, full], 0.34) in easy.values()
    drawn = [run_._choose([easy, full], 0.36).size for _ in range(300)]
    assert set(drawn) == set(batches)
    assert 0.25 < sum(size == (96, 96) for size in drawn) / 300 < 0.42
    assert 0.2 < sum(height > width for height, width in drawn) / sum(h != w for h, w in drawn) < 0.4


def test_a_run_ends_by_the_clock_and_saves_by_it(textures):
    run_ = trainer(textures, minutes=1 / 60, save_minutes=0.0)
    saves, _ = run(run_)
    assert run_.minutes_before >= 1 / 60
    assert saves[-1] == run_.optimizer.step_count > 0
    assert saves[:-1] == list(range(1, saves[-1] + 1))
    run(run_)
    assert run_.optimizer.step_count == saves[-1]  # its time is over


def test_a_resumed_run_counts_on_and_sees_new_worlds(textures, tmp_path):
    first = trainer(textures, max_steps=3, easy_share=0.0)
    run(first)
    torch.save(first.state(), tmp_path / "state.pt")
    second = trainer(textures, max_steps=5, easy_share=0.0)
    second.load_state(load_state_file(tmp_path / "state.pt"))
    assert torch.equal(second.optimizer.parameters, first.optimizer.parameters)
    assert torch.equal(second.optimizer.average, first.optimizer.average)
    assert (second.pairs_seen, second.minutes_before) == (6, first.minutes_before)
    assert not torch.equal(second.engine.dice.uniform(4), Dice("cpu", 0).uniform(4))
    run(second)
    assert (second.optimizer.step_count, second.pairs_seen) == (5, 10)
    assert second.minutes_before > first.minutes_before


def test_batches_made_ahead_train_the_same_network(textures):
    options = {"max_steps": 3, "easy_share": 0.0, "constant_share": 1.0, "heights": (32, 48)}
    runs = [trainer(textures, overlap=ahead, **options) for ahead in (False, True)]
    for run_ in runs:
        run(run_)
    assert runs[0].pairs_seen == runs[1].pairs_seen
    assert torch.allclose(runs[0].optimizer.parameters, runs[1].optimizer.parameters, atol=1e-6)


def test_a_run_is_measured_at_its_start_now_and_then_and_at_its_end(textures):
    run_ = trainer(textures, max_steps=4, easy_share=0.0, log_steps=2, measure_minutes=0.0)
    lines = []
    run_.train(lambda t: None, lines.append, lambda t: {"rra15": t.optimizer.step_count / 10})
    measured = [(row["pairs"], row["rra15"]) for row in run_.history if "rra15" in row]
    assert measured == [(0, 0.0), (2, 0.1), (4, 0.2), (6, 0.3), (8, 0.4), (8, 0.4)]
    assert sum("error0" in row for row in run_.history) == 2
    assert lines[0].endswith("rra15 0.000")


def test_a_session_ends_before_its_run_which_goes_on_later(textures):
    first = trainer(textures, session_minutes=0.5 / 60, max_steps=500)
    run(first)
    assert 0 < first.optimizer.step_count < 500
    assert first.minutes_before < 0.5  # of 30: the schedule does not know of sessions
    second = trainer(textures, max_steps=first.optimizer.step_count + 1)
    second.load_state(first.state())
    run(second)
    assert second.optimizer.step_count == first.optimizer.step_count + 1


def test_photos_of_two_worlds_teach_low_confidence_and_no_coordinates(textures):
    batch = make_batch(Dice("cpu", 1), 4, (32, 48), Source(textures), LoopConfig(samples=1, apart_share=0.5))
    whole = make_batch(Dice("cpu", 1), 4, (32, 48), Source(textures), LoopConfig(samples=1))
    assert batch.apart.tolist() == [True, True, False, False] * 2
    assert torch.equal(batch.images[:, 0], whole.images[:, 0])
    assert torch.equal(batch.images[:2, 1], whole.images[1:3, 1])  # each has the second photo of the next world
    assert torch.equal(batch.images[2:, 1], whole.images[2:, 1])
    assert (batch.targets[batch.apart] == -100).all()
    raw = torch.randn((8, 2, 32, 48, 4), generator=torch.Generator().manual_seed(0)).requires_grad_()
    points, confidence = raw[..., :3], 1 + raw[..., 3].exp()
    prediction = PairPrediction(points[:, 0], confidence[:, 0], points[:, 1], confidence[:, 1])
    loss, report = objective(prediction, batch.truth, batch.valid, batch.apart, batch.centers, 0.2)
    loss.backward()
    assert (raw.grad[batch.apart][..., :3] == 0).all()
    assert (raw.grad[batch.apart][..., 3] > 0).all()  # downwards, in every pixel
    assert raw.grad[~batch.apart][..., :3].abs().sum() > 0
    log_confidence = confidence.detach().log()
    assert report[3] == pytest.approx(log_confidence[batch.apart].mean().item(), rel=1e-4)
    known = batch.valid & ~batch.apart[:, None, None, None]
    assert report[2] == pytest.approx(log_confidence[known].mean().item(), rel=1e-4)


def test_without_photos_of_two_worlds_the_loss_is_the_paper_s(textures):
    batch = make_batch(Dice("cpu", 3), 2, (32, 48), Source(textures), LoopConfig(samples=1))
    points = torch.randn((4, 2, 32, 48, 3), generator=torch.Generator().manual_seed(0))
    confidence = torch.full((4, 2, 32, 48), 1.5)
    prediction = PairPrediction(points[:, 0], confidence[:, 0], points[:, 1], confidence[:, 1])
    loss, report = objective(prediction, batch.truth, batch.valid, batch.apart, batch.centers, 0.2)
    error = regression_error(points, batch.truth, batch.valid)
    assert torch.allclose(loss, confidence_loss(error, confidence, batch.valid, 0.2))
    assert report[3] == 0


class Waits(TorchDispatchMode):
    """Notes what a captured CUDA graph could not hold: copies of numbers from the host, and reading of values."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__
        copies = name.startswith("lift_fresh") and args[0].dim() > 0  # a single number is written by a kernel
        if copies or name.split(".")[0] in ("_local_scalar_dense", "nonzero", "masked_select", "unique2"):
            self.seen.append(name)
        return function(*args, **(kwargs or {}))


def test_a_step_never_waits_for_the_device(textures):
    rooms = make_scene(3, (48, 64), seed=1)
    cameras = zip(rooms.views, rooms.depth, rooms.K, rooms.cam_from_world, strict=True)
    views = [DepthView(name=v.name, image=v.image, depth=d, K=K, cam_from_world=T) for v, d, K, T in cameras]
    source = Source(textures, make_scene_pairs([views], "cpu"))
    config = LoopConfig(**SHORT | {"batch": 4, "apart_share": 0.5, "pose": 0.5, "log_space": True})
    run_ = Trainer(Dust3r(TINY), source, config)
    run_.engine.learn(run_.engine.make((32, 48)))  # what is made once is made before the capture
    with Waits() as waits:
        run_.engine.learn(run_.engine.make((32, 48)))
        run_.optimizer.step(1e-3, 1.0, 0.9)
    assert waits.seen == []


def test_the_average_is_what_is_saved(textures):
    run_ = trainer(textures, max_steps=3)
    run(run_)
    weights = run_.weights()
    model = dict(run_.model.named_parameters())
    assert set(weights) == set(model)
    assert not torch.equal(weights["enc_blocks.0.mlp.fc1.weight"], model["enc_blocks.0.mlp.fc1.weight"])
    Dust3r(TINY).load_state_dict(weights, strict=False)


def test_the_same_seed_trains_the_same_network(textures):
    options = {"max_steps": 2, "easy_share": 0.0, "constant_share": 1.0}  # a learning rate that knows no clock
    runs = [trainer(textures, seed=seed, **options) for seed in (0, 0, 1)]
    for run_ in runs:
        run(run_)
    first, again, other = (run_.optimizer.parameters for run_ in runs)
    assert torch.allclose(first, again, atol=1e-6)
    assert not torch.allclose(first, other, atol=1e-5)


def test_the_learning_rate_rises_by_steps_and_falls_by_time():
    config = LoopConfig(learning_rate=2.0, warmup_steps=10, final_share=0.1)
    assert learning_rate(config, 0, 0.0) == pytest.approx(0.2)
    assert learning_rate(config, 4, 0.0) == pytest.approx(1.0)
    assert learning_rate(config, 9, 0.0) == learning_rate(config, 500, 0.0) == pytest.approx(2.0)
    assert learning_rate(config, 500, 0.5) == pytest.approx(2.0 * 0.55)
    assert learning_rate(config, 500, 1.0) == learning_rate(config, 500, 1.7) == pytest.approx(0.2)
    falling = [learning_rate(config, 500, k / 20) for k in range(21)]
    assert falling == sorted(falling, reverse=True)


def test_the_learning_rate_can_stay_before_it_falls():
    config = LoopConfig(learning_rate=1.0, warmup_steps=1, final_share=0.0, constant_share=0.6)
    assert [learning_rate(config, 9, p) for p in (0.0, 0.3, 0.6)] == [1.0, 1.0, 1.0]
    assert learning_rate(config, 9, 0.8) == pytest.approx(0.5)
    assert learning_rate(config, 9, 1.0) == 0.0


@pytest.mark.parametrize("options", [{"heights": (100,)}, {"heights": ()}, {"easy_width": 8}, {"portrait": 1.5}])
def test_settings_that_cannot_be_are_refused(options):
    with pytest.raises(ValueError, match="must be"):
        LoopConfig(**options)


PROCESS = """
    import os, sys
    from functools import partial
    import torch
    from dust3r_sfm.models.dust3r import Dust3r, Dust3rConfig
    from dust3r_sfm.training import render, synthetic
    from dust3r_sfm.training.batches import Source
    from dust3r_sfm.training.config import LoopConfig
    from dust3r_sfm.training.loop import Trainer
    from dust3r_sfm.training.textures import generated_textures, with_mipmaps

    kernel = render.load_kernel("cpu")
    if kernel is not None:
        render.render = partial(render.render_fused, kernel)
        synthetic._render_depth = lambda p, l, c, h, w, t: render.render_fused(kernel, p, l, c, t, h, w, 1, False)[1]
    rank, folder = int(sys.argv[1]), sys.argv[2]
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    torch.manual_seed(rank)
    config = Dust3rConfig(image_size=64, enc_embed_dim=32, enc_depth=1, enc_num_heads=2, dec_embed_dim=32, dec_depth=1,
                          dec_num_heads=2)
    loop = LoopConfig(batch=1, heights=(32,), width=48, easy_heights=(32,), easy_width=32, samples=1, warmup_steps=1,
                      max_steps=4, log_steps=2)
    trainer = Trainer(Dust3r(config), Source(with_mipmaps(generated_textures(2))), loop, rank, 2)
    start = trainer.optimizer.parameters.clone()
    saves, lines = [], []
    trainer.train(lambda t: saves.append(1), lines.append, lambda t: {"rra15": 0.5})
    result = {"start": start, "end": trainer.optimizer.parameters, "average": trainer.optimizer.average}
    result |= {"saves": torch.tensor(len(saves)), "lines": torch.tensor(len(lines))}
    result |= {"pairs": torch.tensor(trainer.pairs_seen), "dice": trainer.engine.dice.uniform(8)}
    torch.save(result, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()
"""


def test_two_processes_stay_one_network(tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", textwrap.dedent(PROCESS)]
    processes = [
        subprocess.Popen([*command, str(rank), str(tmp_path)], stderr=subprocess.PIPE, env=environment)
        for rank in (0, 1)
    ]
    for process in processes:
        _, stderr = process.communicate(timeout=120)
        assert process.returncode == 0, stderr.decode()
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    for key in ("start", "end", "average"):
        assert torch.equal(first[key], second[key]), key
    assert not torch.equal(first["start"], first["end"])
    assert not torch.equal(first["dice"], second["dice"])  # each renders worlds of its own
    assert first["pairs"] == second["pairs"] == 8
    assert (first["saves"], second["saves"], first["lines"], second["lines"]) == (2, 0, 4, 0)  # measured twice
