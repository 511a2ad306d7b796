"""A CLIP tokenizer for the demo model: every word of its small language is one token, all else is spelt in bytes."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from training.demo_model.prompts import WORDS

BEGIN, END = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"


def build_tokenizer(tokens: int) -> CLIPTokenizer:
    """Build a tokenizer that pads to, and cuts at, the given number of tokens.

    Equally frequent merges come in an order that changes from call to call, and so do the tokens' numbers. All parts of
    a model must therefore use one and the same tokenizer.
    """
    vocabulary, merges = _vocabulary()
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=tokens)


def save_tokenizer(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Save tokenizer.json, and the older pair of files that transformers 4 reads."""
    tokenizer.save_pretrained(folder)
    saved = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    (folder / "vocab.json").write_text(json.dumps(saved["vocab"], ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in saved["merges"])]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Build vocabulary and merges in CLIP's order: bytes, bytes that end a word, merges, then the two marks."""
    learnt = Tokenizer(models.BPE(end_of_word_suffix=WORD_END))
    learnt.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(vocab_size=10_000, min_frequency=1, end_of_word_suffix=WORD_END, show_progress=False)
    learnt.train_from_iterator(WORDS, trainer)
    merges = [(left, right) for left, right in json.loads(learnt.to_str())["model"]["merges"]]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    entries = [*letters, *(letter + WORD_END for letter in letters)]
    entries += dict.fromkeys(left + right for left, right in merges)
    return {entry: index for index, entry in enumerate([*entries, BEGIN, END])}, merges
