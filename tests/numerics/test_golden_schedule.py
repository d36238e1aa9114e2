"""Noise schedule and DDIM steps against the official LongAlign code (commit 61a1021).

Golden G4. The official tables are in float32, so its float64 rows agree to that. For v-prediction
the official step takes v for noise; ours is compared with the step that converts it.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from segalign.diffusion.linear_steps import clean_step, ddim_step
from segalign.diffusion.sampler import DDIMSampler
from segalign.diffusion.schedule import NoiseSchedule

pytestmark = pytest.mark.numerics

GOLDEN = Path(__file__).parents[1] / "golden"
G4 = json.loads((GOLDEN / "g4_schedule.json").read_text())
TOLERANCE = 1e-6


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN / "g4_schedule.safetensors")


def distance(found, expected):
    return float((found - expected.double()).norm() / expected.double().norm())


def apply(step, golden, row):
    latents, output = golden["sample"][row].double(), golden["model_output"][row].double()
    return step.a * latents + step.b * output


def schedule_of(golden, kind):
    return NoiseSchedule(golden["alphas_cumprod"].double(), kind)


def test_noise_levels(golden):
    ours = NoiseSchedule.from_config(G4["scheduler_config"])
    assert distance(ours.alphas_cumprod, golden["alphas_cumprod"]) < TOLERANCE


@pytest.mark.parametrize(
    ("kind", "rows"),
    [
        ("epsilon", "float64.epsilon.pred_x0"),
        ("v_prediction", "float64.v_prediction.pred_x0"),
        ("sample", "float32.sample.pred_x0"),
    ],
)
def test_predicted_clean_latents(kind, rows, golden):
    schedule = schedule_of(golden, kind)
    for row, timestep in enumerate(golden["timesteps"].tolist()):
        found = apply(clean_step(schedule, timestep), golden, row)
        assert distance(found, golden[rows][row]) < TOLERANCE


@pytest.mark.parametrize(
    ("kind", "rows"),
    [
        ("epsilon", "float64.epsilon.prev"),
        ("epsilon", "float64.epsilon.prev_is_prev"),
        ("v_prediction", "float32.v_prediction.prev_with_converted_noise"),
    ],
)
def test_steps(kind, rows, golden):
    levels = golden["alphas_cumprod"].double().tolist()
    for row, timestep in enumerate(golden["timesteps"].tolist()):
        before = max(timestep - G4["step_ratio"], 0)
        step = ddim_step(timestep, levels[timestep], levels[before], kind)
        assert distance(apply(step, golden, row), golden[rows][row]) < TOLERANCE


def test_the_chain_of_fifty_steps(golden):
    schedule = schedule_of(golden, "epsilon")
    path = DDIMSampler(num_inference_steps=50, spacing="official").path(schedule)
    assert list(path.timesteps) == G4["time_all"]
    closed = torch.tensor(G4["dx0_deps"]["closed_form"], dtype=torch.float64)
    assert torch.allclose(path.gradient_factors, closed, rtol=1e-13, atol=0)
    # The official chain, by autograd; its coefficients are in float32.
    official = torch.tensor(G4["dx0_deps"]["float64"], dtype=torch.float64)
    assert torch.allclose(path.gradient_factors, official, rtol=2e-6, atol=0)
    from_noise = G4["dx0_dxT"]["float64"]
    assert path.noise_coefficients[-1].item() == pytest.approx(from_noise, rel=TOLERANCE)
