"""The README of an exported scorer: where it comes from, and how it must be read."""

import json
from collections.abc import Mapping
from dataclasses import dataclass

from segalign.errors import ConfigError
from segalign.rewards.direction_checks import describe_text
from segalign.text.segmenter import Segmenter
from segalign.text.segmenters import describe_segmenter

_FRONT = """\
---
library_name: transformers
pipeline_tag: zero-shot-image-classification
tags: [clip, preference-model, long-captions, segalign]
---
"""
_LICENSE = """\
## License
These weights derive from the model that training started with and stay under its license, \
together with the terms of the data. Neither is known to the program that wrote this file: look \
them up before you share the weights.
"""
_HOW_READ = {
    "segments": "A caption's score is the mean of its segments' scores: split it, embed every "
    "segment, and average their unit features. Read whole, and cut at the context, it loses what "
    "this model was trained for.",
    "whole": "Captions are read whole, cut at the context.",
}


@dataclass(frozen=True, kw_only=True)
class ScorerCard:
    """What is known of a trained scorer.

    Attributes:
        source: The model that training started with.
        trained: What of it was trained.
        losses: Weights by loss.
        checkpoint: Digest of the checkpoint.
        step: Optimizer steps; None if unknown.
        weights: ``raw``, or ``ema`` for the moving average.
        segmenter: Splits captions; None reads them whole.
    """

    source: str
    trained: str
    losses: Mapping[str, float]
    checkpoint: str
    step: int | None
    weights: str
    segmenter: Segmenter | None

    def text(self, inverse_temperature: float) -> str:
        """Write the README.

        Args:
            inverse_temperature: Factor of cosine similarities that the model was trained with.
        """
        text = describe_text(self.segmenter)
        facts = {
            "Started from": self.source,
            "Trained": self.trained,
            "Losses": ", ".join(f"{weight:g} {name}" for name, weight in self.losses.items()),
            "Optimizer steps": "unknown" if self.step is None else str(self.step),
            "Weights": "moving average" if self.weights == "ema" else "as trained",
            "Checkpoint": self.checkpoint,
            "Inverse temperature": f"{inverse_temperature:.6g}",
            "Captions": text,
        }
        rows = "\n".join(f"- {name}: `` {value} ``" for name, value in facts.items())
        return f"""{_FRONT}
# Preference model of images and captions

{rows}

{_HOW_READ[text.partition(" ")[0]]}

## Use
```python
{self._code()}
```
`scores` are unscaled, `(B,)`, of images in [0, 1], `(B, 3, H, W)`, with their captions; gradients \
reach the images. `transformers.CLIPModel` loads the folder too, and reads captions whole.

{_LICENSE}"""

    def _code(self) -> str:
        """Write code that scores as training did."""
        imports, settings = ["from segalign.rewards.zoo import HuggingFaceClip"], 'text="whole"'
        if self.segmenter is not None:
            settings = f'text="segments", segmenter={self._segmenter_code()}'
            if "build_segmenter" in settings:
                imports.append("from segalign.text.segmenters import build_segmenter")
        load = f'reward = HuggingFaceClip(model="FOLDER", {settings}).load()'
        return "\n".join([*imports, "", load, "scores = reward(images, captions)"])

    def _segmenter_code(self) -> str:
        """Write code that makes the segmenter; of one from elsewhere, the name of its class."""
        assert self.segmenter is not None
        try:
            return f"build_segmenter({json.dumps(describe_segmenter(self.segmenter))})"
        except ConfigError:
            return f"{type(self.segmenter).__qualname__}(...)"
