"""The embedded model's files: tokenizer, config and weights, a directory that transformers loads as it is.

recipes/ holds the run that remakes the weights; `build_tokenizer` remakes the tokenizer. Importing this is cheap.
"""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

DIRECTORY = Path(__file__).parent

SPECIAL = ("<pad>", "<eos>", "<unk>")
"""Ids 0, 1, 2. Padding is a token of its own: a reward model that pools by pad id needs one that no text holds."""

CHARACTERS = (
    "\n" + string.digits + "+-= " + "".join(c for c in map(chr, range(33, 127)) if c not in string.digits + "+-=")
)
"""Ids 3 to 98. The sums need digits, + - and =; the rest of printable ASCII lets other text through unharmed."""


def build_tokenizer() -> Any:
    """One character a token, no merges, nothing added at the start, no chat template; what is not ASCII is <unk>.

    Returns a PreTrainedTokenizerFast whose save_pretrained(DIRECTORY) wrote the shipped files.
    """
    from tokenizers import Regex, Tokenizer
    from tokenizers.decoders import Fuse
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Split
    from transformers import PreTrainedTokenizerFast

    pad, eos, unk = SPECIAL
    vocabulary = {token: index for index, token in enumerate((*SPECIAL, *CHARACTERS))}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=unk))
    tokenizer.pre_tokenizer = Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = Fuse()  # joins without the spaces that decoding words would put between tokens
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        eos_token=eos,
        unk_token=unk,
        model_max_length=64,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )
