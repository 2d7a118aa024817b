"""Masks: drawn, and moved."""

import pytest
import torch

from hf_rece.training.masks import magnitude_masks, move_weights, random_mask


def make(n_active=12, shape=(5, 8)):
    mask = random_mask(torch.Size(shape), n_active, torch.Generator().manual_seed(0))
    return torch.randn(shape) * mask, mask, torch.randn(shape)


def move(weight, mask, gradient, ratio, floor=0):
    weight, mask = weight.clone(), mask.clone()
    moved = move_weights({"w": weight}, {"w": mask}, {"w": gradient}, ratio, {"w": floor})
    return weight, mask, moved["w"]


@pytest.mark.parametrize("n_active", [0, 1, 17, 40])
def test_a_random_mask_has_exactly_as_many_as_asked(n_active):
    assert make(n_active)[1].sum() == n_active


def test_a_random_mask_favours_no_place():
    generator = torch.Generator().manual_seed(0)
    total = sum(random_mask(torch.Size([4, 5]), 5, generator).float() for _ in range(2000))
    assert (total / 2000 - 0.25).abs().max() < 0.05


def test_the_smallest_are_dropped_and_the_steepest_grown():
    weight, mask, gradient = make()
    new_weight, new_mask, moved = move(weight, mask, gradient, 0.25)
    dropped, grown = mask & ~new_mask, new_mask & ~mask
    assert dropped.sum() == grown.sum() == 3
    assert weight[dropped].abs().max() < weight[mask & new_mask].abs().min()
    assert gradient[grown].abs().min() > gradient[~mask & ~new_mask].abs().max()
    assert torch.equal(moved, dropped | grown)
    assert not new_weight[moved].any()
    assert torch.equal(new_weight[~moved], weight[~moved])


def test_ties_change_no_count():
    weight, mask, _ = make()
    _, new_mask, _ = move(weight.sign(), mask, torch.zeros_like(weight), 0.25)
    assert (mask & ~new_mask).sum() == (new_mask & ~mask).sum() == 3


def test_what_was_dropped_does_not_come_back_at_once():
    weight, mask, gradient = make()
    *_, moved = move(weight, mask, gradient + 1e3 * mask, 0.25)
    assert moved.sum() == 6


@pytest.mark.parametrize(("n_active", "n_moved"), [(36, 4), (40, 0), (1, 0), (2, 1)])
def test_no_more_move_than_there_is_room_for(n_active, n_moved):
    _, new_mask, moved = move(*make(n_active), 0.5)
    assert moved.sum() == 2 * n_moved
    assert new_mask.sum() == n_active


def test_budgets_move_between_tensors_down_to_the_floor():
    weights = {"small": 1e-3 * torch.randn(10), "large": torch.randn(4, 5)}
    masks = {"small": torch.arange(10) < 6, "large": torch.arange(20).view(4, 5) < 6}
    gradients = {"small": torch.zeros(10), "large": torch.ones(4, 5)}
    for name, weight in weights.items():
        weight.mul_(masks[name])
    largest = weights["small"].abs().topk(2).indices
    move_weights(weights, masks, gradients, 0.5, {"small": 2, "large": 1})
    assert {name: int(mask.sum()) for name, mask in masks.items()} == {"small": 2, "large": 10}
    assert masks["small"][largest].all()


def test_magnitudes_are_compared_across_tensors():
    weights = {"a": torch.tensor([1.0, -5.0, 2.0]), "b": torch.tensor([[4.0, 0.0]])}
    masks = magnitude_masks(weights, 3)
    assert masks["a"].tolist() == [False, True, True]
    assert masks["b"].tolist() == [[True, False]]
