"""Expected scaling of both stages of longSD from 1 to 512 GPUs: computed, not measured.

    python benchmarks/scaling.py --save
    python benchmarks/scaling.py --gpu A100 --mfu 0.25 --network-gbit 200

A step is the work of its images, at an assumed share of the peak (MFU), and then the exchange of
gradients, with no overlap of the two. Prints tables; ``--save`` writes
``benchmarks/results/scaling.md``.
"""

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

RESULT = Path(__file__).parent / "results" / "scaling.md"
# Dense bfloat16 TFLOP/s, and GB/s that a GPU sends within its node, by the makers' data sheets.
GPUS = {"H100": (989.0, 450.0), "A100": (312.0, 300.0)}

# Stable Diffusion 1.5 at 512 pixels with 480 text tokens, rank 32: docs/reward_tuning.md.
FORWARD_TFLOP = 0.837
WITH_ADAPTERS, BACKWARD, DECODER, REWARD = 1.046, 1.232, 6.05, 0.81  # in forward passes
# benchmarks/results/full_size.md
ALIGN_TFLOP = 3.2658
LORA, ADAPTER, UNET = 28_291_072, 21_254_528, 859_520_964  # parameters


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Nodes of equal GPUs, each GPU with its own port of the network.

    Attributes:
        tflops: Peak of a GPU, dense bfloat16.
        mfu: Share of it that a step is assumed to reach.
        node_rate: Bytes per second that a GPU sends within its node.
        network_rate: Bytes per second that a GPU sends to another node.
        bandwidth_share: Share of both rates that collectives are assumed to reach.
        hop_seconds: Latency of one hop, within a node and between nodes.
        gpus_per_node: GPUs of each node.
        spread: Standard deviation of the ranks' step times, as a share of the mean.
    """

    tflops: float
    mfu: float
    node_rate: float
    network_rate: float
    bandwidth_share: float = 0.75
    hop_seconds: tuple[float, float] = field(default=(3e-6, 15e-6))
    gpus_per_node: int = 8
    spread: float = 0.02

    def compute_seconds(self, num_images: float, tflop: float) -> float:
        """Return how long a GPU works on some images."""
        return num_images * tflop / (self.mfu * self.tflops)

    def reduce_seconds(self, num_bytes: float, num_gpus: int) -> float:
        """Return how long an all-reduce takes.

        Within nodes every GPU sums its share, the shares are summed in a ring over the nodes, each
        GPU through its own port, and are then spread within nodes again.
        """
        inside = min(num_gpus, self.gpus_per_node)
        num_nodes = math.ceil(num_gpus / self.gpus_per_node)
        seconds = ring_seconds(
            num_bytes, inside, self.bandwidth_share * self.node_rate, self.hop_seconds[0]
        )
        return seconds + ring_seconds(
            num_bytes / inside,
            num_nodes,
            self.bandwidth_share * self.network_rate,
            self.hop_seconds[1],
        )

    def sharded_seconds(self, num_bytes: float, num_gpus: int) -> float:
        """Return how long weights that all GPUs share travel in a step.

        They are gathered for the forward and for the backward pass, and gradients summed into
        shares: one and a half all-reduces.
        """
        return 1.5 * self.reduce_seconds(num_bytes, num_gpus)

    def slowest(self, num_gpus: int) -> float:
        """Return how much longer the slowest of the ranks takes than the mean one."""
        return 1 + self.spread * expected_maximum(num_gpus)


def ring_seconds(num_bytes: float, num_ranks: int, rate: float, hop_seconds: float) -> float:
    """Return how long a ring all-reduce takes: every rank sends 2 (n - 1) shares of 1/n.

    Args:
        num_bytes: Of the whole tensor.
        num_ranks: n.
        rate: Bytes per second that a rank sends.
        hop_seconds: Latency of one sending.
    """
    return 2 * (num_ranks - 1) * (num_bytes / num_ranks / rate + hop_seconds)


def expected_maximum(num: int) -> float:
    """Return the expected largest of normal draws, in standard deviations: Blom's formula."""
    if num == 1:
        return 0.0
    low, high, share = 0.0, 10.0, (num - 0.375) / (num + 0.25)
    for _ in range(60):
        middle = (low + high) / 2
        below = 0.5 * (1 + math.erf(middle / math.sqrt(2))) < share
        low, high = (middle, high) if below else (low, middle)
    return low


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of longSD.

    Attributes:
        name: What it is called.
        tflop: Work of an image.
        steps: Optimizer steps of the recipe.
        global_batch: Images of a step of the recipe.
        images_per_gpu: Of a GPU, where the batch grows with the number of GPUs.
        num_trained: Parameters that the recipe trains.
    """

    name: str
    tflop: float
    steps: int
    global_batch: int
    images_per_gpu: int
    num_trained: int

    @property
    def total_tflop(self) -> float:
        """Work of the whole recipe."""
        return self.steps * self.global_batch * self.tflop


def reward_tflop(num_steps: int = 50, num_trained: int = 5, calls: int = 2) -> float:
    """Return the work of an image of reward tuning, by the formula of docs/reward_tuning.md."""
    trained = num_trained * calls * (WITH_ADAPTERS + BACKWARD)
    return FORWARD_TFLOP * (num_steps * calls + trained + DECODER + REWARD)


ALIGN = Stage(
    name="stage 1, `configs/longsd_align.yaml`",
    tflop=ALIGN_TFLOP, steps=28750, global_batch=192, images_per_gpu=16, num_trained=LORA + ADAPTER,
)  # fmt: skip
TUNING = Stage(
    name="stage 2, `configs/longsd.yaml`",
    tflop=reward_tflop(), steps=3750, global_batch=48, images_per_gpu=8, num_trained=LORA,
)  # fmt: skip


def growing_rows(stage: Stage, cluster: Cluster, counts: Sequence[int]) -> list[str]:
    """Tabulate steps whose batch grows with the number of GPUs."""
    rows = []
    for num in counts:
        work = cluster.compute_seconds(stage.images_per_gpu, stage.tflop) * cluster.slowest(num)
        low_rank = cluster.reduce_seconds(4 * stage.num_trained, num)
        full = cluster.reduce_seconds(4 * UNET, num)
        sharded = cluster.sharded_seconds(4 * UNET, num)
        one = cluster.compute_seconds(stage.images_per_gpu, stage.tflop)
        cells = [
            num, stage.images_per_gpu * num, f"{work:.3f} s",
            *(f"{1e3 * seconds:.1f} ms" for seconds in (low_rank, full, sharded)),
            *(f"{one / (work + seconds):.1%}" for seconds in (low_rank, full)),
            f"{stage.images_per_gpu * num / (work + low_rank):.1f}",
        ]  # fmt: skip
        rows.append(f"| {' | '.join(map(str, cells))} |")
    return rows


def fixed_rows(stage: Stage, cluster: Cluster, counts: Sequence[int]) -> list[str]:
    """Tabulate the recipe as it is, its batch split over more GPUs."""
    rows = []
    for num in counts:
        own = stage.global_batch / num
        if stage.global_batch % num:
            rows.append(f"| {num} | {stage.global_batch} images cannot be split | | | |")
            continue
        work = cluster.compute_seconds(own, stage.tflop) * cluster.slowest(num)
        seconds = work + cluster.reduce_seconds(4 * stage.num_trained, num)
        hours = stage.steps * seconds / 3600
        cells = [num, f"{own:.0f}", f"{seconds:.2f} s", f"{hours:.1f}", f"{hours * num:.1f}"]
        rows.append(f"| {' | '.join(map(str, cells))} |")
    return rows


def fixed_counts(stage: Stage, counts: Sequence[int]) -> list[int]:
    """Add the largest number of GPUs among which whole images can be shared."""
    return sorted({*counts, stage.global_batch})


GROWING = """
| GPUs | images of a step | slowest rank's work | exchange, LoRA | exchange, all weights \
| sharded, each pass | efficiency, LoRA | efficiency, all weights | images per second, LoRA |
|---|---|---|---|---|---|---|---|---|"""
FIXED = """
| GPUs | images of a GPU | step | hours | GPU-hours |
|---|---|---|---|---|"""


def report(cluster: Cluster, gpu: str, counts: Sequence[int]) -> str:
    """Write the tables as Markdown."""
    lines = [assumptions(cluster, gpu)]
    for stage in (ALIGN, TUNING):
        heading = (
            f"**{stage.name}**: {stage.tflop:.1f} TFLOP for an image, "
            f"{stage.num_trained / 1e6:.1f} M weights trained."
        )
        recipe = (
            f"The recipe as it is: {stage.global_batch} images a step, {stage.steps:,} steps, "
            f"{stage.total_tflop:.3g} TFLOP in all."
        )
        lines += ["", heading, GROWING, *growing_rows(stage, cluster, counts)]
        lines += ["", recipe, FIXED, *fixed_rows(stage, cluster, fixed_counts(stage, counts))]
    return "\n".join(lines) + "\n"


def assumptions(cluster: Cluster, gpu: str) -> str:
    """Say what the numbers rest on."""
    network = cluster.network_rate * 8 / 1e9
    return (
        "`benchmarks/scaling.py`. **Computed, not measured.** Assumed: "
        f"{gpu} at {cluster.mfu:.0%} of {cluster.tflops:.0f} TFLOP/s, whatever a GPU's batch is; "
        f"{cluster.gpus_per_node} to a node, {cluster.node_rate / 1e9:.0f} GB/s within it and "
        f"{network:.0f} Gbit/s for each GPU between nodes, {cluster.bandwidth_share:.0%} of both "
        f"reached; step times of ranks that spread by {cluster.spread:.0%}; gradients in float32, "
        "exchanged after the backward pass; data that are always there. The work is that of "
        "training LoRA in all columns."
    )


def main() -> None:
    """Compute and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpu", choices=list(GPUS), default="H100")
    parser.add_argument("--mfu", type=float, default=0.3)
    parser.add_argument("--network-gbit", type=float, default=400.0, help="of each GPU's port")
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 8, 64, 512])
    parser.add_argument("--save", action="store_true", help=f"write {RESULT.name}")
    options = parser.parse_args()
    tflops, node_rate = GPUS[options.gpu]
    cluster = Cluster(
        tflops=tflops,
        mfu=options.mfu,
        node_rate=node_rate * 1e9,
        network_rate=options.network_gbit / 8 * 1e9,
    )
    text = report(cluster, options.gpu, options.gpus)
    print(text, end="")
    if options.save:
        RESULT.write_text(text)


if __name__ == "__main__":
    main()
