"""Laws of Muon and Adam over flat buffers."""

import pytest
import torch
from torch import nn

from dust3r_sfm.training.optimizer import Optimizer, orthogonalize


class Network(nn.Module):
    """Matrices that Muon takes, and the rest: a bias, a norm, a matrix outside the blocks."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Linear(6, 8)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"qkv": nn.Linear(8, 24), "fc1": nn.Linear(8, 16), "fc2": nn.Linear(16, 8)}) for _ in range(2)
        )
        self.norm = nn.LayerNorm(8)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            q, k, v = block["qkv"](x).chunk(3, -1)
            x = x + v * torch.sigmoid(q + k)
            x = x + block["fc2"](block["fc1"](x).relu())
        return self.norm(x)


def backward(network, seed=0):
    g = torch.Generator().manual_seed(seed)
    x, y = torch.randn((32, 6), generator=g), torch.randn((32, 8), generator=g)
    loss = (network(x) - y).square().mean()
    loss.backward()
    return float(loss.detach())


@pytest.mark.parametrize("shape", [(1, 16, 64), (5, 64, 16), (3, 8, 128), (2, 24, 24)])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e3])
def test_orthogonalized_matrices_keep_their_directions_with_singular_values_about_one(shape, scale):
    g = torch.Generator().manual_seed(1)
    rows, columns = shape[1:]
    u, _ = torch.linalg.qr(torch.randn((shape[0], rows, min(rows, columns)), generator=g))
    v, _ = torch.linalg.qr(torch.randn((shape[0], columns, min(rows, columns)), generator=g))
    values = torch.linspace(0.1, 1.0, min(rows, columns))
    out = orthogonalize(scale * (u * values) @ v.mT)
    assert out.shape == shape
    inner = torch.linalg.inv(u.mT @ u) @ u.mT @ out @ v @ torch.linalg.inv(v.mT @ v)
    along = inner.diagonal(dim1=1, dim2=2)
    assert along.min() > 0.6
    assert along.max() < 1.3
    assert (inner - torch.diag_embed(along)).abs().max() < 0.1
    assert torch.linalg.svdvals(out).max() < 1.3


def test_the_step_of_zero_momentum_is_zero():
    assert not orthogonalize(torch.zeros((2, 4, 6))).any()


def test_muon_takes_the_matrices_of_the_blocks_and_queries_keys_values_apart():
    optimizer = Optimizer(Network())
    shapes = {(s.rows, s.columns): s.count for s in optimizer.stacks}
    assert shapes == {(8, 8): 6, (16, 8): 2, (8, 16): 2}
    assert optimizer.split == 6 * 64 + 4 * 128
    assert Optimizer(Network(), muon=False).split == 0


def test_each_stack_is_the_matrices_themselves():
    network = Network()
    optimizer = Optimizer(network)
    for stack in optimizer.stacks:
        for matrix in stack.of(optimizer.parameters):
            pieces = [m for p in network.parameters() if p.ndim == 2 for m in p.split(matrix.shape[0])]
            assert any(m.shape == matrix.shape and torch.equal(m, matrix) for m in pieces)


def test_the_flat_buffer_is_the_parameters():
    network = Network()
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    optimizer = Optimizer(network)
    assert len(optimizer.parameters) == sum(p.numel() for p in before.values())
    for name, p in network.named_parameters():
        assert torch.equal(p, before[name])
    optimizer.parameters.fill_(7.0)
    assert all((p == 7).all() for p in network.parameters())


def test_gradients_are_taken_by_parameter_and_not_added_up():
    network, reference = Network(), Network()
    optimizer = Optimizer(network)
    for seed in (0, 1):  # the second replaces the first
        backward(network, seed)
        optimizer.take_gradients()
    backward(reference, 1)
    assert all(p.grad is None for p in network.parameters())
    expected = dict(reference.named_parameters())
    at = 0
    for name in optimizer.names:
        size = expected[name].numel()
        assert torch.allclose(optimizer.gradient[at : at + size], expected[name].grad.flatten(), atol=1e-7)
        at += size


def test_parameters_that_the_loss_leaves_out_have_no_gradient():
    network = Network()
    optimizer = Optimizer(network)
    backward(network)
    optimizer.take_gradients()
    network.stem(torch.ones((1, 6))).sum().backward()
    optimizer.take_gradients()
    assert optimizer.gradient.count_nonzero() == 6 * 8 + 8


@pytest.mark.parametrize("muon", [True, False])
def test_steps_lower_the_loss(muon):
    network = Network()
    optimizer = Optimizer(network, muon=muon)
    losses = []
    for step in range(60):
        losses.append(backward(network))
        optimizer.take_gradients()
        optimizer.step(0.02 * (1 - step / 60), clip=1.0, average_decay=0.9)
    assert losses[-1] < 0.55 * losses[0]  # the targets are noise: no network of this size meets them


def test_a_quadratic_is_brought_to_its_minimum():
    network, goal = Network(), Network()
    with torch.no_grad():
        for p in goal.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    optimizer = Optimizer(network, weight_decay=0.0)
    distances = []
    for step in range(200):
        pairs = zip(network.parameters(), goal.parameters(), strict=True)
        loss = sum((p - q.detach()).square().sum() for p, q in pairs)
        loss.backward()
        distances.append(float(loss.detach()))
        optimizer.take_gradients()
        optimizer.step(0.1 * (1 - step / 200), clip=1e9, average_decay=0.9)
    assert distances[-1] < 1e-3 * distances[0]


def test_without_muon_a_step_is_adamw():
    network, reference = Network(), Network()
    optimizer = Optimizer(network, muon=False, weight_decay=0.1)
    decayed = [p for p in reference.parameters() if p.ndim > 1]
    others = [p for p in reference.parameters() if p.ndim <= 1]
    adamw = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}], lr=0.01, betas=(0.9, 0.95)
    )
    for seed in range(5):
        backward(network, seed)
        optimizer.take_gradients()
        optimizer.step(0.01, clip=1e9, average_decay=0.9)
        adamw.zero_grad()
        backward(reference, seed)
        adamw.step()
    for p, q in zip(network.parameters(), reference.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-5)


def test_muons_step_is_of_adams_size():
    """Each matrix moves by 0.2 of the learning rate in the mean square, whatever its shape and gradient."""
    network = Network()
    optimizer = Optimizer(network, weight_decay=0.0)
    before = [stack.of(optimizer.parameters).clone() for stack in optimizer.stacks]
    optimizer.gradient.copy_(torch.randn(optimizer.gradient.shape, generator=torch.Generator().manual_seed(0)))
    optimizer.step(1e-3, clip=1.0, average_decay=0.9)
    for stack, old in zip(optimizer.stacks, before, strict=True):
        moved = (stack.of(optimizer.parameters) - old).square().mean((1, 2)).sqrt()
        assert torch.all((moved > 1e-4) & (moved < 2.5e-4))


def test_a_long_gradient_is_clipped_and_its_norm_reported():
    networks = [Network(), Network()]
    optimizers = [Optimizer(network, muon=False) for network in networks]
    g = torch.randn(optimizers[0].gradient.shape, generator=torch.Generator().manual_seed(0))
    g /= g.norm()
    for optimizer, length in zip(optimizers, (2.0, 500.0), strict=True):
        optimizer.gradient.copy_(g * length)
        assert float(optimizer.step(1e-3, clip=2.0, average_decay=0.9)) == pytest.approx(length, rel=1e-4)
    assert torch.allclose(optimizers[0].first, optimizers[1].first, atol=1e-7)
    assert torch.allclose(optimizers[0].second, optimizers[1].second, atol=1e-7)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_counts_as_zero(value):
    network, reference = Network(), Network()
    optimizer, other = Optimizer(network, weight_decay=0.1), Optimizer(reference, weight_decay=0.1)
    before = optimizer.parameters.clone()
    optimizer.gradient[3] = value
    norm = optimizer.step(0.01, clip=1.0, average_decay=0.9)
    assert not norm.isfinite()
    matrices = torch.cat([torch.ones(optimizer.split), optimizer.decayed])
    assert torch.allclose(optimizer.parameters, before * (1 - 0.01 * 0.1 * matrices), rtol=1e-6)
    other.step(0.01, clip=1.0, average_decay=0.9)  # of a gradient of zeros
    for seed in range(2):
        for net, opt in ((network, optimizer), (reference, other)):
            backward(net, seed)
            opt.take_gradients()
            opt.step(0.01, clip=1.0, average_decay=0.9)
    optimizer.gradient[0] = value
    other.gradient.zero_()
    for opt in (optimizer, other):
        opt.step(0.01, clip=1.0, average_decay=0.9)
    assert torch.equal(optimizer.parameters, other.parameters)
    assert optimizer.parameters.isfinite().all()


def test_averaged_weights_follow_the_weights_with_a_lag():
    network = Network()
    optimizer = Optimizer(network, muon=False, weight_decay=0.0)
    start = optimizer.parameters.clone()
    optimizer.gradient.fill_(1.0)
    moved = []
    for _ in range(150):
        optimizer.step(0.01, clip=1e9, average_decay=0.9)
        moved.append((optimizer.average - start).mean() / (optimizer.parameters - start).mean())
    assert all(0 < share < 1 for share in moved)
    lag = float((optimizer.average - optimizer.parameters).mean()) / 0.01
    assert lag == pytest.approx(0.9 / (1 - 0.9), rel=0.1)  # steps: the mean age of what the average holds
    named = optimizer.averaged_weights()
    assert set(named) == {name for name, _ in network.named_parameters()}
    assert torch.equal(torch.cat([named[name].flatten() for name in optimizer.names]), optimizer.average)
    assert named["stem.weight"].shape == (8, 6)


def test_the_first_average_forgets_the_random_start_quickly():
    optimizer = Optimizer(Network(), muon=False, weight_decay=0.0)
    optimizer.parameters.fill_(1.0)
    optimizer.average.zero_()
    for _ in range(30):
        optimizer.step(0.0, clip=1.0, average_decay=0.999)
    assert optimizer.average.min() > 0.95  # a plain average of 0.999 would be at 0.03


def test_a_restored_state_continues_to_the_bit():
    def run(network, optimizer, seeds):
        for seed in seeds:
            backward(network, seed)
            optimizer.take_gradients()
            optimizer.step(0.01, clip=1.0, average_decay=0.99)

    network, other = Network(), Network()
    optimizer = Optimizer(network)
    run(network, optimizer, range(3))
    saved = {k: v.clone() for k, v in optimizer.state().items()}
    run(network, optimizer, range(3, 6))
    restored = Optimizer(other)
    restored.load_state(saved)
    run(other, restored, range(3, 6))
    assert restored.step_count == 6
    for key, value in optimizer.state().items():
        assert torch.equal(restored.state()[key], value), key
