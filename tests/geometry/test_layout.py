"""Places for the nodes of a drawn graph."""

import pytest
import torch

from dust3r_sfm.geometry.layout import spring_layout


def two_groups(size):
    """Edges of two complete graphs and one weak edge between them."""
    inside = torch.combinations(torch.arange(size))
    edges = torch.cat([inside, inside + size, torch.tensor([[0, size]])])
    weights = torch.ones(len(edges))
    weights[-1] = 0.1
    return edges, weights


def test_groups_that_a_weak_edge_joins_lie_apart():
    places = spring_layout(12, *two_groups(6))
    within = torch.cat([torch.pdist(places[:6]), torch.pdist(places[6:])])
    assert torch.cdist(places[:6], places[6:]).mean() > 2 * within.mean()


@pytest.mark.parametrize("num_nodes", [0, 1, 2, 3, 50])
def test_nodes_lie_in_the_square_and_not_on_one_another(num_nodes):
    edges = torch.stack([torch.arange(max(num_nodes - 1, 0)), torch.arange(1, max(num_nodes, 1))], -1)
    places = spring_layout(num_nodes, edges, torch.ones(len(edges)))
    assert places.shape == (num_nodes, 2)
    assert (places.abs() <= 1 + 1e-9).all()
    if num_nodes > 1:
        assert torch.pdist(places).min() > 0.02


def test_the_same_graph_gives_the_same_picture():
    assert torch.equal(spring_layout(12, *two_groups(6)), spring_layout(12, *two_groups(6)))
