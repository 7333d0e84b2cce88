"""Losses and scores of trainings: the overlap of classes, and what the choice of test images moves."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mbnorm.experiments.data import load
from mbnorm.experiments.dataset import Data
from mbnorm.experiments.grid import Run, Setting
from mbnorm.experiments.losses import dice_loss
from mbnorm.experiments.scores import overlaps, share
from mbnorm.experiments.training import Outcome, measured, train


def test_the_share_of_all_images_has_the_binomial_error():
    right = torch.tensor([1.0] * 30 + [0.0] * 10)[:, None]
    score, error = share(right, torch.ones(40, 1))
    assert score == 75.0
    assert error == pytest.approx(196 * math.sqrt(0.75 * 0.25 / 40))


def test_the_error_of_a_ratio_is_that_of_drawing_other_images():
    generator = torch.Generator().manual_seed(0)
    wholes = torch.randint(50, 150, (300, 2), generator=generator)
    parts = (wholes * torch.rand(300, 2, generator=generator)).round()
    _, error = share(parts, wholes)
    drawn = [torch.randint(300, (300,), generator=generator) for _ in range(2000)]
    scores = torch.tensor([share(parts[i], wholes[i])[0] for i in drawn])
    assert error == pytest.approx(1.96 * scores.std().item(), rel=0.06)


def test_overlaps_leave_the_background_out():
    true = torch.tensor([[[0, 0, 1, 2]], [[0, 1, 1, 2]]])
    found = torch.tensor([[[0, 1, 1, 0]], [[0, 1, 1, 2]]])
    both, sizes = overlaps(found, true, 3)
    assert both.tolist() == [[2, 0], [4, 2]]
    assert sizes.tolist() == [[3, 1], [4, 2]]
    assert share(both, sizes)[0] == pytest.approx(100 * (6 / 7 + 2 / 3) / 2)


def test_a_class_that_is_nowhere_scores_nothing():
    assert share(torch.zeros(4, 1), torch.zeros(4, 1)) == (0.0, 0.0)


def test_dice_loss_is_cross_entropy_and_the_lack_of_overlap():
    torch.manual_seed(0)
    logits, targets = torch.randn(2, 3, 4, 4, dtype=torch.float64), torch.randint(3, (2, 4, 4))
    found, lack = logits.softmax(1), 0.0
    for c in (1, 2):
        true = (targets == c).double()
        lack += 0.5 * (1 - (2 * (found[:, c] * true).sum() + 1) / (found[:, c].sum() + true.sum() + 1))
    torch.testing.assert_close(dice_loss(logits, targets), F.cross_entropy(logits, targets) + lack)


def test_dice_loss_lets_gradients_through_where_a_class_is_absent():
    logits = torch.randn(1, 3, 8, requires_grad=True)
    dice_loss(logits, torch.zeros(1, 8, dtype=torch.long)).backward()
    assert torch.isfinite(logits.grad).all()
    assert (logits.grad != 0).all()


class Constant(nn.Module):
    """Finds the class of each pixel in the input itself."""

    def forward(self, x):
        return F.one_hot(x[:, 0].long(), 3).movedim(-1, 1).float()


def test_pixels_are_scored_by_dice_and_images_by_accuracy():
    found = torch.tensor([[[[0.0, 1.0, 1.0, 0.0]]], [[[0.0, 1.0, 1.0, 2.0]]]])
    true = torch.tensor([[[0, 0, 1, 2]], [[0, 1, 1, 2]]])
    scores = measured(Constant(), Data(found, true, found, true, 3))
    assert scores["dice"] == pytest.approx(100 * (6 / 7 + 2 / 3) / 2)
    assert scores["accuracy"] == pytest.approx(75.0)
    assert (scores["even_accuracy"], scores["odd_accuracy"]) == (50.0, 100.0)
    assert Outcome("ok", 1.0, **scores).score == scores["dice"]


def test_images_have_no_dice():
    data = load("digits")
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    scores = measured(model, data)
    assert "dice" not in scores
    assert Outcome("ok", 1.0, **scores).score == scores["accuracy"]
    p = scores["accuracy"] / 100
    assert scores["test_error"] == pytest.approx(
        196 * math.sqrt(p * (1 - p) / len(data.test_inputs)), rel=1e-4
    )


@pytest.mark.parametrize("loss", ["cross-entropy", "dice"])
def test_a_segmentation_is_trained_on_the_loss_that_is_asked_for(loss):
    setting = Setting("segment", 4, "shuffled", 0.05, 1, "segments", loss)
    outcome = train(Run("batch", setting, 0))
    assert outcome.status == "ok"
    assert 0 < outcome.dice < 100
    assert outcome.test_error > 0
    assert outcome.train_loss > 0.3
