"""A tokenizer for `tiny_model`'s checkpoint: a token a byte, so that a prompt's length is the length of its text."""

from __future__ import annotations

import json
from pathlib import Path

from tiny_model import VOCABULARY
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

SPECIAL = ("<bos>", "<eos>")
TEMPLATE = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"


def make(folder: Path) -> Path:
    """Write tokenizer.json and tokenizer_config.json beside the checkpoint; returns the folder."""
    names = [*SPECIAL, *sorted(ByteLevel.alphabet())]
    names += [f"({number})" for number in range(len(names), VOCABULARY)]  # the model may choose any: each has a text
    tokenizer = Tokenizer(BPE(vocab={name: number for number, name in enumerate(names)}, merges=[]))
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = ByteLevelDecoder()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL[0],
        "eos_token": SPECIAL[1],
        "model_max_length": 4096,
        "chat_template": TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder
