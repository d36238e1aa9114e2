"""The computed scaling: its formulae, its assumptions, and that the documents show its numbers."""

import importlib.util
import math
import re
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parents[2]
RESULT = ROOT / "benchmarks" / "results" / "scaling.md"
COUNTS = [1, 8, 64, 512]


@pytest.fixture(scope="module")
def scaling() -> ModuleType:
    spec = importlib.util.spec_from_file_location("scaling", ROOT / "benchmarks" / "scaling.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["scaling"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def cluster(scaling):
    return scaling.Cluster(
        tflops=1000.0,
        mfu=0.5,
        node_rate=400e9,
        network_rate=50e9,
        bandwidth_share=1.0,
        hop_seconds=(0.0, 0.0),
        spread=0.0,
    )


def test_a_ring_sends_twice_nearly_all_bytes(scaling):
    assert scaling.ring_seconds(1e9, 1, 1e9, 1.0) == 0
    assert scaling.ring_seconds(1e9, 4, 1e9, 0.0) == pytest.approx(1.5)
    assert scaling.ring_seconds(0.0, 4, 1e9, 1e-3) == pytest.approx(6e-3)


def test_nodes_exchange_what_their_gpus_have_summed(cluster):
    inside = cluster.reduce_seconds(4e9, 8)
    assert inside == pytest.approx(2 * 7 / 8 * 4e9 / 400e9)
    # Between 2 nodes each of 8 ports carries an eighth.
    assert cluster.reduce_seconds(4e9, 16) == pytest.approx(inside + 2 * 1 / 2 * 4e9 / 8 / 50e9)
    assert cluster.sharded_seconds(4e9, 16) == 1.5 * cluster.reduce_seconds(4e9, 16)


def test_latency_counts_each_hop(cluster):
    slow = replace(cluster, hop_seconds=(1e-3, 1e-2))
    assert slow.reduce_seconds(0, 16) == pytest.approx(2 * 7 * 1e-3 + 2 * 1 * 1e-2)


def test_work_is_that_of_a_share_of_the_peak(cluster):
    assert cluster.compute_seconds(8, 100.0) == pytest.approx(8 * 100 / 500)


@pytest.mark.parametrize("num", [2, 8, 64, 512])
def test_the_slowest_rank_is_that_of_normal_draws(scaling, num):
    draws = torch.randn(4000, num, generator=torch.Generator().manual_seed(0))
    found = statistics.fmean(draws.max(dim=1).values.tolist())
    assert scaling.expected_maximum(num) == pytest.approx(found, abs=0.05)
    assert scaling.expected_maximum(1) == 0


def test_an_image_of_reward_tuning_costs_130_forward_passes(scaling):
    assert scaling.reward_tflop() / scaling.FORWARD_TFLOP == pytest.approx(129.64)
    assert scaling.reward_tflop(num_steps=10, num_trained=0, calls=1) == pytest.approx(
        0.837 * (10 + 6.05 + 0.81)
    )


def test_counts_are_those_of_the_full_size_benchmark(scaling):
    text = (ROOT / "benchmarks" / "results" / "full_size.md").read_text()
    assert f"| in all | {scaling.ALIGN_TFLOP} |" in text
    assert f"| UNet with LoRA | {scaling.UNET + scaling.LORA:,} | {scaling.LORA:,} |" in text
    assert f"| adapter | {scaling.ADAPTER:,} |" in text


def test_the_result_is_what_it_computes(scaling):
    tflops, node_rate = scaling.GPUS["H100"]
    cluster = scaling.Cluster(
        tflops=tflops, mfu=0.3, node_rate=node_rate * 1e9, network_rate=400 / 8 * 1e9
    )
    assert RESULT.read_text() == scaling.report(cluster, "H100", COUNTS)
    assert "Computed, not measured" in RESULT.read_text()


def test_the_document_shows_the_result(scaling):
    document = (ROOT / "docs" / "cluster.md").read_text()
    rows = [line for line in RESULT.read_text().splitlines() if line.startswith("| ")]
    assert rows
    assert [row for row in rows if row not in document.splitlines()] == []
    for stage in (scaling.ALIGN, scaling.TUNING):
        hours = {
            gpu: stage.total_tflop / (0.3 * scaling.GPUS[gpu][0]) / 3600 for gpu in scaling.GPUS
        }
        row = next(line for line in document.splitlines() if line.startswith(f"| {stage.name} |"))
        shown = [float(value) for value in re.findall(r"([\d.]+) GPU-hours", row)]
        assert shown == pytest.approx([hours["H100"], hours["A100"]], abs=0.05)
        assert math.isclose(float(row.split("|")[2]), stage.tflop, rel_tol=0.002)
