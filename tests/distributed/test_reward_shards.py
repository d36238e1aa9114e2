"""Sharded weights (FSDP2) get the gradient that whole ones get, are clipped and measured alike."""

from pathlib import Path

import pytest
import torch
from torch import distributed, multiprocessing, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from segalign.diffusion.generator import TextToImage
from segalign.diffusion.lora import LoraSettings
from segalign.diffusion.pretrained import PretrainedModel
from segalign.diffusion.sampler import DDIMSampler
from segalign.gradients import average_gradients, clip_gradients
from segalign.reward_tuning.lora_norm import lora_norm
from segalign.reward_tuning.settings import RewardStepSettings, StepMemory
from segalign.reward_tuning.step import RewardStep
from segalign.rng import counter_normal
from segalign.text.settings import TextEncoding
from segalign.truncation.drtune import DRTune
from segalign.truncation.step_norms import StepGradientNorms

pytestmark = pytest.mark.distributed

CAPTIONS = ["A red fox sits. It is night.", "Two owls.", "A green house.", "A dog. It runs."]
# Rows of each rank; None is one process with all of them and whole weights.
SHARES = {0: [0, 1], 1: [2, 3], None: [0, 1, 2, 3]}
MAX_NORM = 0.01
# Layers whose weights are sharded; others are whole on all ranks.
SHARDED = [(0, 2), (2,)]
TOLERANCES = {torch.float64: 1e-10, torch.float32: 5e-5}


def clipped(mesh, rank, sharded=()) -> dict[str, torch.Tensor]:
    """Clip a long gradient of layers of uneven width, of which some are sharded."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    for place in sharded:
        fully_shard(network[place], mesh=mesh)
    inputs = counter_normal("toy inputs", [(row,) for row in SHARES[rank]], (5,)).double()
    norms = StepGradientNorms(network.parameters())
    network(inputs).square().sum(1).mean().backward()
    average_gradients(network.parameters())
    norms(0)
    assert not isinstance(norms.norms[0], DTensor)
    norm = clip_gradients(list(network.parameters()), MAX_NORM)
    return {"norm": norm, "step_norm": norms.norms[0], **gradients(network)}


def gradients(network: nn.Module) -> dict[str, torch.Tensor]:
    found = {}
    for name, weight in network.named_parameters():
        if (gradient := weight.grad) is not None:
            whole = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
            found[name] = whole.clone()
    return found


def generator_of(mesh, dtype) -> TextToImage:
    """Make a tiny generator with adapters that change something, its network sharded by blocks."""
    bundle = PretrainedModel(init="random", size="tiny").load()
    encoding = TextEncoding(kind="segments", token_budget=77)
    text_models = encoding.complete(bundle.text_models, 32)
    LoraSettings(rank=2).add_to(bundle.unet)
    unet = bundle.unet.to(dtype)
    for number, (name, weight) in enumerate(unet.named_parameters()):
        if "lora" in name:
            noise = counter_normal("toy adapters", [(number,)], tuple(weight.shape))[0]
            weight.data.copy_(0.1 * noise)
    if mesh is not None:
        for block in (*unet.down_blocks, unet.mid_block, *unet.up_blocks, unet):
            fully_shard(block, mesh=mesh)
    return TextToImage(
        unet,
        encoding.build(text_models).requires_grad_(False).to(dtype),
        bundle.codec.requires_grad_(False).to(dtype),
        bundle.schedule,
        image_size=bundle.image_size,
        mask_padding=False,
    )


def reward(images, captions):
    """Neither linear nor the same for all captions."""
    factors = torch.tensor([1 + len(caption) / 10 for caption in captions])
    return factors * (5 * images).sin().mean(dim=(1, 2, 3))


def stepped(mesh, rank, dtype) -> dict[str, torch.Tensor]:
    """Make the gradient of a step: by several backward passes, on a rank with shards."""
    generator, rows = generator_of(mesh, dtype), SHARES[rank]
    settings = RewardStepSettings(
        strategy=DRTune(num_train_steps=2),
        sampler=DDIMSampler(num_inference_steps=4, guidance_scale=3.0, eta=0.5),
        memory=StepMemory(rollout_batch_size=None if rank is None else 1),
    )
    batch = {
        "sample_ids": torch.tensor(rows),
        "captions": [CAPTIONS[row] for row in rows],
        "valid": torch.tensor([row != 2 for row in rows]),
        "epochs": torch.zeros(len(rows), dtype=torch.int64),
        "metadata": [{} for _ in rows],
    }
    step, passes = RewardStep(generator, reward, settings, seed=0), []
    with torch.no_grad():
        text = generator.conditioner(batch["captions"])

    def backward(loss, _is_last):
        passes.append(1)
        loss.backward()

    step.run(batch, text, 0, backward=backward)
    trained = [weight for weight in generator.unet.parameters() if weight.requires_grad]
    average_gradients(trained)
    found = gradients(generator.unet)
    norm = clip_gradients(trained, MAX_NORM)
    assert len(passes) > 2
    assert all(isinstance(weight, DTensor) == (mesh is not None) for weight in trained)
    return {"norm": norm, "lora_norm": lora_norm(generator.unet), **found}


def of_one_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    mesh = init_device_mesh("cpu", (2,))
    found = {f"clip {sharded}": clipped(mesh, rank, sharded) for sharded in SHARDED}
    found |= {f"step {dtype}": stepped(mesh, rank, dtype) for dtype in TOLERANCES}
    torch.save(found, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


def largest_error(found, wanted) -> float:
    """Largest relative distance of named tensors."""
    assert found.keys() == wanted.keys()
    distances = [(found[name] - tensor).norm() / tensor.norm() for name, tensor in wanted.items()]
    return max(distance.item() for distance in distances)


@pytest.mark.filterwarnings("ignore")
def test_shards_get_the_gradient_of_whole_weights_and_are_clipped_alike(tmp_path: Path):
    multiprocessing.start_processes(of_one_rank, (str(tmp_path),), nprocs=2, start_method="fork")
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    clip = clipped(None, None)
    assert clip["norm"] > 10 * MAX_NORM
    steps = {dtype: stepped(None, None, dtype) for dtype in TOLERANCES}
    for rank in ranks:
        for sharded in SHARDED:
            assert largest_error(rank[f"clip {sharded}"], clip) <= 1e-10, sharded
        for dtype, tolerance in TOLERANCES.items():
            assert largest_error(rank[f"step {dtype}"], steps[dtype]) <= tolerance
