from pathlib import Path

import pytest

from mbnorm.experiments.bench import ranks, rows
from mbnorm.experiments.bench.network import NETWORKS, Network, Work, resnet50_channels, step_seconds

DATA = Path(__file__).parent.parent / "benchmarks" / "ranks"
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


def test_the_published_table_is_that_of_the_published_rows():
    measured = rows.read(DATA / "ranks.jsonl")
    assert (DATA / "ranks.md").read_text(encoding="utf-8") == ranks.table(measured)
    simulated = [r for r in measured if r["kind"] == "simulated"]
    assert len(simulated) == len(NETWORKS) * 4 * 5
