"""Preprocessing against that of transformers and of open_clip, on images of all shapes."""

import open_clip
import pytest
import torch
from torchvision.transforms.functional import to_pil_image
from transformers import CLIPImageProcessor

from segalign.formats.clip_scorer import ImageSettings
from segalign.formats.open_clip_scorer import open_clip_scorer
from segalign.rewards.image_preprocessing import ImagePreprocessing

SIZES = [(24, 20), (16, 16), (40, 17), (9, 30), (21, 16), (16, 19)]
MODES = ("shortest", "squash", "longest")


@pytest.fixture(params=SIZES, ids=str)
def images(request):
    return torch.rand(2, 3, *request.param, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("resize", ["bicubic", "bilinear"])
@pytest.mark.parametrize("fit", ["crop", "squash"])
def test_it_is_that_of_transformers(images, resize, fit):
    side = {"height": 16, "width": 16}
    processor = CLIPImageProcessor(
        size={"shortest_edge": 16} if fit == "crop" else side,
        do_center_crop=fit == "crop",
        crop_size=side,
        resample={"bilinear": 2, "bicubic": 3}[resize],
        do_rescale=False,
    )
    theirs = processor(images, return_tensors="pt")["pixel_values"]
    ours = ImagePreprocessing(ImageSettings(image_size=16, resize=resize, fit=fit))(images)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("mode", MODES)
def test_it_is_that_of_open_clip(images, make_open_clip, mode, interpolation):
    model = make_open_clip().model
    described = {"resize_mode": mode, "interpolation": interpolation, "mean": (0.1, 0.2, 0.3)}
    model.visual.preprocess_cfg = described
    settings = open_clip_scorer(model).image_settings
    # Away from black and white, where PIL cuts off the overshoot of its bicubic filter.
    pictures = (64 + images * 127).round()
    transform = open_clip.image_transform(16, is_train=False, **described)
    theirs = torch.stack([transform(to_pil_image(one.byte())) for one in pictures])
    ours = ImagePreprocessing(settings)(pictures / 255)
    assert settings.mean == (0.1, 0.2, 0.3)
    # PIL rounds to bytes in each of two passes; normalising divides by 0.26.
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1.5 / 255 / 0.26)


def test_the_official_filter_is_an_option():
    images = torch.rand(1, 3, 40, 17)
    settings = ImageSettings(image_size=16)
    bilinear = ImagePreprocessing(settings, resize="bilinear")(images)
    own = ImagePreprocessing(ImageSettings(image_size=16, resize="bilinear"))(images)
    assert torch.equal(bilinear, own)
    assert not torch.allclose(bilinear, ImagePreprocessing(settings)(images), atol=1e-2)


def test_a_cast_keeps_mean_and_deviation_exact(images):
    preprocessing = ImagePreprocessing(ImageSettings(image_size=16))
    expected = preprocessing(images)
    assert torch.equal(preprocessing.bfloat16()(images), expected)


def test_mean_and_deviation_are_made_once_for_each_type(monkeypatch):
    images = torch.rand(2, 3, 16, 16, requires_grad=True)
    preprocessing = ImagePreprocessing(ImageSettings(image_size=16))
    made = []
    new = torch.tensor
    monkeypatch.setattr(torch, "tensor", lambda *a, **k: made.append(a) or new(*a, **k))
    # What inference mode makes must serve gradients later.
    with torch.inference_mode():
        expected = preprocessing(images)
    found = preprocessing(images)
    found.sum().backward()
    assert torch.equal(found, expected)
    assert images.grad is not None
    assert preprocessing(images.double()).dtype is torch.float64
    assert len(made) == 2
