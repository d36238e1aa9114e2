"""The README of an exported model."""

import re
from dataclasses import dataclass

_FRONT = """\
---
library_name: diffusers
pipeline_tag: text-to-image
tags: [text-to-image, long-prompts, segalign]
---
"""
_LICENSE = """\
## License
These weights derive from the base model and stay under its license, together with the terms of \
the data they were trained on. Neither is known to the program that wrote this file: look them up \
before you share the weights.
"""


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """What is known of an exported model.

    Attributes:
        base: The model that was trained further.
        trained: What of it was trained.
        checkpoint: Digest of the checkpoint.
        step: Optimizer steps of training; None if unknown.
        weights: ``raw``, or ``ema`` for the moving average.
        settings: Further settings by name: text encoding, sampler.
    """

    base: str
    trained: str
    checkpoint: str
    step: int | None
    weights: str
    settings: dict[str, str]

    def pipeline_text(self) -> str:
        """Write the README of a pipeline folder."""
        return f"""{_FRONT}
# Text-to-image model for long prompts
{self._facts()}
## Use
```python
from segalign.diffusion.long_text_pipeline import LongTextPipeline

pipe = LongTextPipeline.from_pretrained("FOLDER")
image = pipe("A long prompt. Of any number of sentences.", seed=0).images[0]
image.save("image.png")
```
`DiffusionPipeline.from_pretrained("FOLDER", custom_pipeline="FOLDER", trust_remote_code=True)` \
loads the same pipeline; it runs `pipeline.py`, two lines that import the class. Both need the \
package `segalign`. All tensors are safetensors.

{_LICENSE}"""

    def lora_text(self, how_to_load: str) -> str:
        """Write the README of a folder that holds low-rank adapters.

        Args:
            how_to_load: A paragraph.
        """
        return f"{_FRONT}\n# LoRA for long prompts\n{self._facts()}\n{how_to_load}\n\n{_LICENSE}"

    def _facts(self) -> str:
        rows = {
            "Base": self.base,
            "Trained": self.trained,
            **({} if self.step is None else {"Optimizer steps": str(self.step)}),
            "Weights": "moving average" if self.weights == "ema" else "as trained",
            "Checkpoint": self.checkpoint,
            **self.settings,
        }
        lines = (f"- {name}: {_code(value)}" for name, value in rows.items())
        return "\n" + "\n".join(lines) + "\n"


def _code(value: str) -> str:
    """Quote a value that Markdown might read as markup."""
    return value if re.fullmatch(r"[\w., ()-]*", value) else f"`` {value} ``"
