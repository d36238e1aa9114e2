"""Split captions into windows of a fixed number of tokens."""

from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise

from transformers import CLIPTokenizer

from segalign.errors import ConfigError
from segalign.text.long_segments import BLANKS, Boundary, cut_points
from segalign.text.lru_cache import LruCache
from segalign.text.segmenter import Segment
from segalign.text.tokenizer import clip_tokenizer, word_token_ids

_MAX_CACHED_WORDS = 65_536
_BOUNDARIES: Sequence[Boundary] = ((BLANKS, 0.5),)


class WindowSegmenter:
    """Split into windows of as many word tokens as fit, whatever the sentences.

    A window ends at a blank in its second half if there is one, else anywhere. It never has more
    than ``num_tokens`` tokens, unless it is a single character of more. It may have fewer than
    would fit: tokens are counted word by word, which is exact unless cleaning changes several
    words together, and a window is looked for in 14 characters per token and 64 more.
    Time grows linearly with the caption.

    Args:
        num_tokens: Word tokens of a window; the default is CLIP's context without start and end.
        tokenizer: What counts tokens; null is CLIP's tokenizer, built when it is first needed.

    Raises:
        ConfigError: If ``num_tokens`` is not an integer of at least 1.
    """

    def __init__(self, num_tokens: int = 75, tokenizer: CLIPTokenizer | None = None) -> None:
        if type(num_tokens) is not int or num_tokens < 1:
            raise ConfigError(
                f"`num_tokens` must be an integer of at least 1; got {num_tokens!r}; "
                "what fits the context of CLIP is 75"
            )
        self.num_tokens = num_tokens
        self.tokenizer = tokenizer
        self._counts: LruCache[str, int] = LruCache(_MAX_CACHED_WORDS)

    def split(self, caption: str) -> list[Segment]:
        """Split a caption; ``text`` is exactly ``caption[start:end]``."""
        cuts = cut_points(caption, self.num_tokens, self._count_tokens, _BOUNDARIES)
        bounds = [0, *cuts, len(caption)]
        return [Segment(caption[start:end], start, end) for start, end in pairwise(bounds)]

    @cached_property
    def _counting_tokenizer(self) -> CLIPTokenizer:
        """The given tokenizer, or CLIP's."""
        return self.tokenizer or clip_tokenizer()

    def _count_tokens(self, text: str) -> int:
        """Count the word tokens of a text; the counts of single words are remembered."""
        count = self._counts.get(text)
        if count is None:
            count = len(word_token_ids(text, self._counting_tokenizer))
            self._counts.put(text, count, 1 if len(text) <= 64 else 2**62)
        return count
