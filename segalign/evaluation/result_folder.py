"""Where the files of a result lie in its folder.

Pure standard library, so that a page of many results starts at once.
"""

import re
from pathlib import Path
from typing import Final

RESULT_FILE: Final = "result.json"
LINES_FILE: Final = "images.jsonl"
IMAGES_FOLDER: Final = "images"
_NAME: Final = re.compile(r"[0-9]{6,}\.png")


def image_name(place: int) -> str:
    """Name the file of an image by its place in the plan, such as ``000012.png``."""
    return f"{place:06d}.png"


def image_files(folder: Path) -> dict[int, Path]:
    """List the kept images of a result by place, in their order.

    Args:
        folder: Folder of the result; there may be none.
    """
    images = folder / IMAGES_FOLDER
    found = images.iterdir() if images.is_dir() else ()
    # The name must be the one that is written: `0000012.png` is not.
    places = {int(one.stem): one for one in found if _NAME.fullmatch(one.name)}
    return {p: places[p] for p in sorted(places) if places[p].name == image_name(p)}
