"""Parts that several small models share: tokenizers, and processors of pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

WORDS = ("a", "red", "blue", "circle", "square", "moves", "left", "right", "up", "down", "and", "stays")


def clip_tokenizer(folder: Path) -> None:
    """Save a CLIP tokenizer that knows letters and a few words."""
    letters = [chr(code) for code in range(33, 127)]
    merges: list[str] = []
    vocabulary = [*letters, *(letter + "</w>" for letter in letters)]
    for word in WORDS:
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            merge = f"{pieces[0]} {pieces[1]}"
            if merge not in merges:
                merges.append(merge)
            pieces = [pieces[0] + pieces[1], *pieces[2:]]
            if pieces[0] not in vocabulary:
                vocabulary.append(pieces[0])
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": 16,
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "special_tokens_map.json").write_text(
        json.dumps({name: token for name, token in config.items() if name.endswith("_token")})
    )


def umt5_tokenizer(folder: Path) -> int:
    """Save a tokenizer of a few words; returns the size of its vocabulary."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "</s>", "<unk>", *WORDS]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer: Any = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    fast: Any = PreTrainedTokenizerFast
    fast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=512,
    ).save_pretrained(str(folder))
    return len(words)


def preprocessor(folder: Path, side_pixels: int) -> None:
    """Save the preprocessor config of a CLIP vision encoder."""
    config = {
        "image_processor_type": "CLIPImageProcessor",
        "crop_size": {"height": side_pixels, "width": side_pixels},
        "size": {"shortest_edge": side_pixels},
        "image_mean": [0.48, 0.46, 0.41],
        "image_std": [0.27, 0.26, 0.28],
    }
    folder.mkdir()
    (folder / "preprocessor_config.json").write_text(json.dumps(config))


def clip_processor(config: Mapping[str, Any]) -> Any:
    """Return the processor with which a pipeline prepares pictures for CLIP."""
    from transformers import CLIPImageProcessor

    return CLIPImageProcessor(**{name: config[name] for name in ("crop_size", "image_mean", "image_std")})


def as_picture(image_FHWC: Tensor) -> Image.Image:
    """Return the first frame as a picture for a pipeline."""
    return Image.fromarray((image_FHWC[0] * 255).round().to(torch.uint8).numpy())
