"""The benchmark's networks: small, but of the classes that full-size models have."""

from diffusers import UNet2DConditionModel
from transformers import CLIPConfig, CLIPModel

from segalign.scenes.world import CELL_PIXELS, World
from segalign.text.tokenizer import CONTEXT_LENGTH, VOCAB_SIZE

TEXT_WIDTH = 64
UNSHUFFLE_FACTOR = 6
START_TOKEN, END_TOKEN = VOCAB_SIZE - 2, VOCAB_SIZE - 1

# A clean image is easier to predict than noise for a network narrower than its input.
SCHEDULER_CONFIG = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "sample",
}


def scorer_model(world: World) -> CLIPModel:
    """Build the untrained CLIP-type scorer; its text tower is also the generator's.

    One patch is one cell of the grid, so that a token holds a whole object.
    """
    text = {
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 4 * TEXT_WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": CONTEXT_LENGTH,
        "vocab_size": VOCAB_SIZE,
        "bos_token_id": START_TOKEN,
        "eos_token_id": END_TOKEN,
        "pad_token_id": END_TOKEN,
    }
    vision = {
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": world.image_size,
        "patch_size": CELL_PIXELS,
    }
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=128))


def generator_unet(world: World) -> UNet2DConditionModel:
    """Build the untrained one-level denoising network, 1.1 M parameters.

    ``attention_head_dim`` is the number of heads in diffusers' UNets.
    """
    channels = 3 * UNSHUFFLE_FACTOR**2
    return UNet2DConditionModel(
        sample_size=world.image_size // UNSHUFFLE_FACTOR,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(64,),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",),
        mid_block_type="UNetMidBlock2DCrossAttn",
        up_block_types=("CrossAttnUpBlock2D",),
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
    )
