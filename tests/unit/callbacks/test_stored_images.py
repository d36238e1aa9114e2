"""Images of a report as files: what is read is what was rounded, whatever the images are."""

import torch
from PIL import Image

from callbacks.stored_images import as_stored, read_image, write_image


def test_a_file_holds_what_was_rounded(tmp_path):
    image = torch.rand(3, 5, 7, generator=torch.Generator().manual_seed(0)) * 1.2 - 0.1
    write_image(tmp_path / "a.png", image)
    found = read_image(tmp_path / "a.png")
    assert torch.equal(found, as_stored(image[None])[0])
    assert (found - image.clamp(0, 1)).abs().max() <= 0.5 / 255 + 1e-6
    assert torch.equal((found * 255).round() / 255, found)
    with Image.open(tmp_path / "a.png") as file:
        assert (file.mode, file.size) == ("RGB", (7, 5))


def test_pixels_that_are_not_finite_survive_and_are_transparent(tmp_path):
    image = torch.full((3, 4, 4), 0.5)
    image[1, 0, 2], image[2, 3, 3] = torch.nan, torch.inf
    write_image(tmp_path / "a.png", image)
    found = read_image(tmp_path / "a.png")
    assert found[:, 0, 2].isnan().all()
    assert found[:, 3, 3].isnan().all()
    assert found.isfinite().sum() == 3 * 14
    with Image.open(tmp_path / "a.png") as file:
        assert file.getpixel((2, 0))[3] == 0
        assert file.getpixel((0, 0)) == (128, 128, 128, 255)
    # The moments of a report that have no file agree on which images are not finite.
    torch.testing.assert_close(as_stored(image[None])[0], found, rtol=0, atol=0, equal_nan=True)
