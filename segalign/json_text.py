"""JSON from elsewhere, which may be anything."""

import json
from typing import Any


def parse_json(content: str | bytes) -> Any:
    """Parse JSON, or refuse it in the one way that callers expect.

    Args:
        content: The text, or its bytes.

    Raises:
        ValueError: If it is no JSON, or is nested deeper than the interpreter can follow.
    """
    try:
        return json.loads(content)
    except RecursionError as error:
        raise ValueError("JSON that is nested too deeply") from error
