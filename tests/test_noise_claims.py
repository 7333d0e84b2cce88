"""The evidence on noise: what it adds to a loss, what it does to trainings, and which layers to convert."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from evidence import best_noise, noise_of_mobilenet, noise_ranking, regularizer, underfitting
from evidence.claim import as_markdown, draw
from evidence.lists import MLP
from evidence.noise_layers import NoisyBatchNorm, Size, SplitBatchNorm, independent
from evidence.regularizer import Net, of_batches, of_signs
from mbnorm import diagnose
from mbnorm.experiments.dataset import Data
from mbnorm.experiments.grid import Run

IMAGES = 4096
TINY = replace(MLP, epochs=1, images=200)


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def smooth_net(channels=3):
    """A net without kinks whose only batch norm has inputs of independent channels."""
    model = nn.Sequential(nn.BatchNorm1d(channels), nn.Tanh(), nn.Linear(channels, 2))
    nn.init.normal_(model[0].weight)
    nn.init.normal_(model[2].weight)
    return Net(model, torch.randn(IMAGES, channels), torch.randint(0, 2, (IMAGES,)))


def inputs_of(net):
    order = torch.arange(len(net.inputs))
    with torch.no_grad():
        net.losses({}, order)
    return net.layers[0].given, order


def test_real_noise_is_what_normalizing_each_batch_by_itself_adds():
    net, m = smooth_net(), 8
    order = torch.arange(IMAGES)
    added = net.added({0: lambda z: of_batches(z, m).exact(net.layers[0].eps)}, order)
    split = SplitBatchNorm(net.layers[0].norm, m).train()
    logits = net.model[2](net.model[1](split(net.inputs)))
    with_noise = nn.functional.cross_entropy(logits, net.targets)
    without = net.losses({}, order).mean()
    assert added == pytest.approx(float((with_noise - without).detach()), rel=1e-4)


def test_the_statistics_of_another_batch_are_those_of_the_one_before():
    z = torch.randn(12, 3)
    own, other = of_batches(z, 4), of_batches(z, 4, others=True)
    torch.testing.assert_close(other.mean[4:], own.mean[:8])
    torch.testing.assert_close(other.var[:4], own.var[8:])


def test_differences_and_products_agree_where_nothing_has_kinks():
    net = smooth_net()
    z, order = inputs_of(net)
    deviations = of_batches(z, 8)
    products = net.by_products(0, deviations, order)
    assert net.by_differences(0, deviations, order) == pytest.approx(products, rel=0.01)


def test_to_second_order_a_large_batchs_noise_adds_what_it_adds():
    net, m = smooth_net(), 64
    z, order = inputs_of(net)
    real = net.added({0: lambda z: of_batches(z, m).exact(net.layers[0].eps)}, order)
    assert net.by_products(0, of_batches(z, m), order) == pytest.approx(real, rel=0.1)


def test_the_formula_is_the_pages():
    # y = w ((1+q) z + p) + b under a quadratic loss has derivatives that are known
    net, n = smooth_net(1), 32
    z, _ = inputs_of(net)
    net.losses = lambda sources, order: square_loss(net, sources, order)
    order = torch.arange(IMAGES)
    expected = 0.5 / n + 5 / 4 / n * 1.0 + 0.5 * 1.0 / (2 * n)
    found = [
        net.by_products(0, of_signs(independent(n), z, torch.Generator().manual_seed(i)), order)
        for i in range(40)
    ]
    # 3 %: 40 draws of signs for each of 4096 images, and terms of order 1/n^2
    assert sum(found) / 40 == pytest.approx(expected, rel=0.05)


def square_loss(net, sources, order):
    """Half the square of the normalized input with its noise."""
    z = net.layers[0].given[order]
    noise = sources[0](z) if 0 in sources else regularizer.Noise(torch.zeros_like(z), torch.zeros_like(z))
    return ((1 + noise.q) * z + noise.p).square().sum(1) / 2


def regularizer_rows():
    value = dict.fromkeys(regularizer.WAYS, 0.25)
    return [
        {
            "task": task.name,
            "seed": s,
            "images": m,
            "loss": 0.1,
            "added": {"0": value, regularizer.ALL: value},
        }
        for task in regularizer.TASKS
        for s in range(3)
        for m in regularizer.SIZES
    ]


def test_the_table_of_the_regularizer_is_in_units_of_1_over_m(tmp_path):
    tables = regularizer.CLAIM.tables(regularizer_rows())
    assert [line[1:3] for line in tables[0][1]] == [["0.50 ± 0.00", "1.00 ± 0.00"]] * len(regularizer.WAYS)
    assert tables[1][1] == [["0", *["4.00 ± 0.00"] * len(regularizer.WAYS)]]
    draw(regularizer.CLAIM, regularizer_rows(), tmp_path / "plot.png")


def test_a_regularizer_is_measured_by_layer_and_for_all(monkeypatch):
    monkeypatch.setattr(regularizer, "trained_net", lambda task, seed: smooth_net())
    monkeypatch.setattr(regularizer, "TASKS", (MLP,))
    monkeypatch.setattr(regularizer, "SIZES", (16, 32))
    rows = list(regularizer.CLAIM.rows(1, lambda _: None, []))
    assert [row["images"] for row in rows] == [16, 32]
    assert {key: set(ways) for key, ways in rows[0]["added"].items()} == {
        "0": set(regularizer.WAYS),
        "all": set(regularizer.WAYS),
    }
    # one layer is all layers
    for way in regularizer.WAYS:
        if way != regularizer.INJECTED:
            assert rows[1]["added"]["0"][way] == pytest.approx(rows[1]["added"]["all"][way])
    assert list(regularizer.CLAIM.rows(1, lambda _: None, rows)) == []


@pytest.mark.parametrize("name", [underfitting.INJECTED, underfitting.WITH_ITSELF, underfitting.SPLIT])
def test_a_net_with_noise_has_it_in_every_layer_and_the_weights_of_the_others(name):
    data = underfitting.data_of(TINY, "report")
    run = Run("batch", TINY.setting(0.1, 32), 0)
    plain, noisy = (underfitting.net(which, run, data) for which in (underfitting.AT_32, name))
    kind = SplitBatchNorm if name == underfitting.SPLIT else NoisyBatchNorm
    assert sum(isinstance(m, kind) for m in noisy.modules()) == 6
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), noisy.parameters(), strict=True))


@pytest.mark.parametrize("name", [underfitting.AT_32, underfitting.WITH_ITSELF])
def test_a_training_is_measured_with_exact_statistics(name):
    row = underfitting.trained(TINY, name, 0)
    assert row["status"] == "ok"
    assert {"train_mode_loss", "loss", "train_accuracy", "accuracy"} <= row.keys()


def test_a_training_whose_loss_is_too_large_has_diverged(monkeypatch):
    monkeypatch.setattr(underfitting, "DIVERGED", 0.0)
    assert underfitting.trained(TINY, underfitting.AT_32, 0)["status"] == "diverged"


def underfitting_rows():
    return [
        {"task": task.name, "name": name, "seed": seed, "status": "ok"}
        | {"train_mode_loss": 0.5, "train_accuracy": 90.0, "accuracy": 90.0 + number + seed}
        for task in underfitting.TASKS
        for number, name in enumerate(underfitting.NAMES)
        for seed in range(3)
    ]


def test_trainings_are_compared_seed_by_seed(tmp_path):
    rows = underfitting_rows()
    (_, lines), _ = underfitting.CLAIM.tables(rows)
    place = {name: number for number, name in enumerate(underfitting.NAMES)}
    for name, line in zip(underfitting.NAMES, lines, strict=True):
        other = underfitting.COMPARED.get(name)
        assert line[-1] == ("-" if other is None else f"{place[name] - place[other]:+.1f} ± 0.0")
    assert "Matched BN at 2, against batch norm at 32: +1.0 ± 0.0" in as_markdown(
        underfitting.CLAIM, rows, "command"
    )
    draw(underfitting.CLAIM, rows, tmp_path / "plot.png")


def test_injected_noise_is_that_of_so_many_values(monkeypatch):
    given = []

    class Spy(NoisyBatchNorm):
        def __init__(self, norm, size, seed, share=0.0):
            super().__init__(norm, size, seed, share)
            given.append(size(torch.zeros(2, 3)))

    monkeypatch.setattr(best_noise, "NoisyBatchNorm", Spy)
    row = best_noise.trained(TINY, 16, 0)
    assert given == [Size(16, 15)] * 6
    assert (row["values"], row["status"]) == (16, "ok")
    assert best_noise.trained(TINY, None, 0)["values"] == best_noise.NONE
    assert len(given) == 6


def test_noise_is_compared_with_none_and_the_best_is_named(tmp_path):
    rows = [
        {"task": task.name, "values": values or best_noise.NONE, "seed": seed, "status": "ok"}
        | {"accuracy": 90.0 + 2 * (values == 16) + seed}
        for task in best_noise.TASKS
        for values in best_noise.VALUES
        for seed in range(3)
    ]
    ((_, lines),) = best_noise.CLAIM.tables(rows)
    assert lines[best_noise.VALUES.index(16)][:3] == ["16", "93.0 ± 2.5", "+2.0 ± 0.0"]
    assert lines[-1][2] == "-"
    text = as_markdown(best_noise.CLAIM, rows, "command")
    assert "MLP of six layers: that of 16 values (93.0 %, +2.0 ± 0.0 against none)" in text
    draw(best_noise.CLAIM, rows, tmp_path / "plot.png")


def test_a_ranking_takes_the_half_of_the_layers_that_need_it_most():
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4), nn.BatchNorm1d(4), nn.BatchNorm1d(4))
    model[1].weight.data.mul_(10)
    found = diagnose(model, torch.randn(60, 2, 4), loss=lambda y, _: y.square().mean())
    by_loss = noise_ranking.ranked(found, noise_ranking.BY_LOSS)
    by_size = noise_ranking.ranked(found, noise_ranking.BY_SIZE)
    least = min(found.layers, key=lambda layer: layer.cost.added)
    largest = max(found.layers, key=lambda layer: layer.noise.effective_values)
    assert (len(by_loss), least.name in by_loss) == (2, False)
    assert (len(by_size), largest.name in by_size) == (2, False)
    assert noise_ranking.ranked(found, noise_ranking.EVERYTHING) == ["0", "2", "3"]
    assert noise_ranking.ranked(found, noise_ranking.NOTHING) == []


def test_rankings_are_trained_and_shown(monkeypatch, tmp_path):
    monkeypatch.setattr(noise_ranking, "TASKS", (TINY,))
    rows = list(noise_ranking.CLAIM.rows(1, lambda _: None, []))
    assert [len(row["layers"]) for row in rows] == [3, 3, 6, 0]
    assert list(noise_ranking.CLAIM.rows(1, lambda _: None, rows)) == []
    ((_, (line,)),) = noise_ranking.CLAIM.tables(rows)
    shared = len({*rows[0]["layers"]} & {*rows[1]["layers"]})
    assert line[-1] == f"{shared:.1f} of 3"


def tiny_mobilenet(monkeypatch):
    net = nn.Sequential(
        *(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 9)),
    )
    draws = torch.Generator().manual_seed(0)
    images, classes = torch.randn(300, 1, 8, 8, generator=draws), torch.randint(0, 3, (300,), generator=draws)
    data = Data(images, classes, images, classes, 3)
    monkeypatch.setattr(noise_of_mobilenet, "pretrained", lambda start: net)
    monkeypatch.setattr(noise_of_mobilenet, "data_of", lambda task: data)
    monkeypatch.setattr(noise_of_mobilenet, "COUNTS", (1, 2))
    return data


def test_the_new_last_layer_of_a_trained_net_learns(monkeypatch):
    data = tiny_mobilenet(monkeypatch)
    model = noise_of_mobilenet.with_trained_head(0, data)
    assert model.training
    logits = model.eval()(data.train_inputs)
    assert nn.functional.cross_entropy(logits, data.train_targets) < torch.log(torch.tensor(3.0))


def test_what_is_left_with_all_layers_chosen_does_not_depend_on_the_ranking(monkeypatch, tmp_path):
    tiny_mobilenet(monkeypatch)
    (row,) = noise_of_mobilenet.CLAIM.rows(1, lambda _: None, [])
    for ranking in (noise_of_mobilenet.BY_LOSS, noise_of_mobilenet.BY_SIZE):
        assert row[ranking][1] == pytest.approx(row["all"])
    assert list(noise_of_mobilenet.CLAIM.rows(1, lambda _: None, [row])) == []
    (_, lines), (_, chosen), _ = noise_of_mobilenet.CLAIM.tables([row])
    assert {line[0] for line in lines} == {"1", "4", "all together"}
    assert [line[0] for line in chosen] == ["0", "1", "2", "all"]
    draw(noise_of_mobilenet.CLAIM, [row], tmp_path / "plot.png")
