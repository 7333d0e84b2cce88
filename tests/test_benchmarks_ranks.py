import pytest

from benchmarks import ranks
from benchmarks.network import NETWORKS, Network, Work, resnet50_channels, step_seconds

NETWORK = Network("test", latency=1e-3, bandwidth=1e6)


def test_an_all_reduce_is_a_ring_or_a_tree_whichever_is_faster():
    assert NETWORK.all_reduce(8, 4) == pytest.approx(2 * (2 * 1e-3 + 8e-6))
    assert NETWORK.all_reduce(1e6, 4) == pytest.approx(2 * 3 * (1e-3 + 0.25))


def test_resnet50_has_its_norms():
    assert len(resnet50_channels()) == 53
    assert sum(resnet50_channels()) == 26560


def test_without_a_network_to_wait_for_a_step_is_its_compute():
    work = Work(forward=1.0, backward=2.0, ask=0.0, jitter=0.0)
    free = Network("free", latency=0.0, bandwidth=float("inf"))
    for sync in ("none", "late", "True", "SyncBatchNorm"):
        assert step_seconds(free, 8, sync, work) == pytest.approx(3.0)


def test_pooling_waits_for_each_layer_twice_and_late_layers_for_none():
    work = Work(forward=1.0, backward=2.0, ask=0.0, jitter=0.0, parameters=53, bucket_bytes=1e9)
    slow = Network("slow", latency=1e-3, bandwidth=float("inf"))
    none, late, pooled = (step_seconds(slow, 4, sync, work) for sync in ("none", "late", "True"))
    assert late == pytest.approx(none)
    assert pooled == pytest.approx(none + 2 * 53 * 2 * 2e-3)


def test_each_network_is_simulated_with_each_way_to_share():
    assert len(ranks.simulate()) == len(NETWORKS) * 4 * 5
