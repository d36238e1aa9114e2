"""Features of a frozen text model, computed once and kept on disk.

A store is a folder: ``store.json`` says what it holds, ``features-*.safetensors`` hold the
features, ``index.safetensors`` finds a token sequence among them by its 128-bit digest.
``main.py shards encode`` makes one.

Dims: N sequences, S tokens of a sequence, T tokens of all, D text width, E width of pooled
features.
"""

import hashlib
import json
from collections import OrderedDict
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from segalign.errors import ConfigError, DataError
from segalign.json_text import parse_json
from segalign.text.digest_index import DigestIndex, digest_ids
from segalign.text.text_states import TextModel
from segalign.text.tokenizer import TokenIds

STORE_NAME: Final = "store.json"
INDEX_NAME: Final = "index.safetensors"
STORE_FORMAT: Final = {"format": "segalign-text-features", "version": 1}
_MAX_OPEN_FILES: Final = 128
# Settings that change the states but leave the weights alone.
_CONFIG_KEYS: Final = ("hidden_act", "num_attention_heads", "layer_norm_eps")


def features_name(number: int) -> str:
    """Name the file of a store's features with this number."""
    return f"features-{number:05d}.safetensors"


def weights_digest(text_model: TextModel) -> str:
    """Hash what a text model computes with: its weights and the settings beside them.

    Moves leave it as it is; casts that round do not. About a second for 10^9 bytes of weights.
    """
    settings = {key: getattr(text_model.config, key) for key in _CONFIG_KEYS}
    digest = hashlib.blake2b(json.dumps(settings).encode(), digest_size=16)
    # transformers 4 and 5 name the parts of a text model with and without this prefix.
    weights = {k.removeprefix("text_model."): v for k, v in text_model.state_dict().items()}
    for name, weight in sorted(weights.items()):
        digest.update(f"\n{name} {weight.dtype} {tuple(weight.shape)}\n".encode())
        raw = weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(raw.numpy().data)
    return digest.hexdigest()


def dtype_name(text_model: TextModel) -> str:
    """Name the number type that a text model computes in, as configs do."""
    return str(text_model.dtype).removeprefix("torch.")


class FeatureStore:
    """Read the features of token sequences from a folder; only what is asked for is read.

    Args:
        folder: The store.
        description: Content of its ``store.json``.
    """

    def __init__(self, folder: Path, description: dict[str, Any]) -> None:
        self.folder = folder
        self.description = description
        index = open_file(folder / INDEX_NAME)
        # Tensors of a file are mapped, not read: a search touches a few pages.
        self._tensors = {name: index.get_tensor(name) for name in index.keys()}  # noqa: SIM118
        columns = {name: tensor.numpy() for name, tensor in self._tensors.items()}
        self._digests = DigestIndex(columns["high"], columns["low"])
        self._files, self._places = columns["file"], columns["place"]
        self._open_files: OrderedDict[int, tuple[Any, Tensor]] = OrderedDict()

    @classmethod
    def open(cls, folder: str | Path) -> "FeatureStore":
        """Open a finished store.

        Raises:
            ConfigError: If there is none.
            DataError: If its files are damaged.
        """
        path = Path(folder) / STORE_NAME
        if not path.is_file():
            raise ConfigError(
                f"expected a finished feature store at `{folder}`; there is no `{STORE_NAME}`; "
                "make or finish it with `python main.py shards encode`"
            )
        try:
            description = parse_json(path.read_bytes())
            known = {key: description.get(key) for key in STORE_FORMAT} == STORE_FORMAT
        except (OSError, ValueError, AttributeError) as error:
            raise _damaged(path, error) from error
        if not known:
            raise _damaged(path, ValueError("another format or version"))
        return cls(Path(folder), description)

    def __len__(self) -> int:
        """Return the number of sequences."""
        return len(self._digests)

    def get(self, sequence: TokenIds) -> tuple[Tensor, Tensor] | None:
        """Read the features of a sequence.

        Returns:
            States ``(S, D)`` and pooled features ``(E,)`` on the CPU, in the store's number type;
            None if the store does not hold the sequence.

        Raises:
            DataError: If a file of the store is missing or damaged.
        """
        found = self._digests.find(digest_ids(sequence))
        if found is None:
            return None
        number, place = int(self._files[found]), int(self._places[found])
        try:
            file, first_rows = self._file(number)
            start, stop = first_rows[place : place + 2].tolist()
            return file.get_slice("rows")[start:stop], file.get_slice("pooled")[place]
        except (SafetensorError, OSError) as error:
            raise _damaged(self.folder / features_name(number), error) from error

    def check(self, text_model: TextModel, layer: int) -> None:
        """See that the store was made with this text model.

        Raises:
            ConfigError: If it holds features of another layer, of other weights, or of these in
                another number type; or if the weights are not there to be compared.
        """
        if any(weight.is_meta for weight in text_model.parameters()):
            raise ConfigError(
                f"the feature store `{self.folder}` serves a text model whose weights are in "
                "memory; these are offloaded layer by layer, or never read; load them or use no "
                "store"
            )
        if self.description["layer"] != layer:
            raise self._foreign(f"layer {self.description['layer']}, not {layer}")
        stored, own = self.description["weights"], weights_digest(text_model)
        if stored == own:
            return
        # Stores of before this was recorded are of float32.
        dtypes = self.description.get("weights_dtype", "float32"), dtype_name(text_model)
        if dtypes[0] != dtypes[1]:
            raise self._of_another_dtype(*dtypes)
        raise self._foreign(f"other weights ({stored[:12]}, not {own[:12]})")

    def __deepcopy__(self, _memo: dict[int, Any]) -> "FeatureStore":
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return FeatureStore.open, (self.folder,)

    def _file(self, number: int) -> tuple[Any, Tensor]:
        """Open a file of features, closing the one used longest ago."""
        if number not in self._open_files:
            file = open_file(self.folder / features_name(number))
            self._open_files[number] = file, file.get_tensor("first_rows")
            if len(self._open_files) > _MAX_OPEN_FILES:
                self._open_files.popitem(last=False)
        self._open_files.move_to_end(number)
        return self._open_files[number]

    def _of_another_dtype(self, stored: str, own: str) -> ConfigError:
        return ConfigError(
            f"the feature store `{self.folder}` must be made with the text model in use; it holds "
            f"features of weights in {stored}, the model's are in {own}; set the model's `dtype` "
            f"to {stored}, or make another with `shards encode --weights-dtype {own}`"
        )

    def _foreign(self, found: str) -> ConfigError:
        return ConfigError(
            f"the feature store `{self.folder}` must be made with the text model in use; it holds "
            f"features of {found}; make another with `python main.py shards encode`, or use none"
        )


def open_file(path: Path) -> Any:
    """Open a safetensors file of a store, for reading parts of it.

    Raises:
        DataError: If it is missing or damaged.
    """
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> DataError:
    return DataError(
        f"`{path}` must be a sound file of a feature store; got: {str(error).splitlines()[0]}; "
        "delete the store and make it again with `python main.py shards encode`"
    )
