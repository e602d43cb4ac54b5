"""Build the tokenizer and the token streams from the standard library."""

import argparse
import json
import platform
import random
import re
import sysconfig
from itertools import pairwise
from pathlib import Path

import numpy as np
from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from .library import conversations, is_held_out, is_test, standard_library_files
from .settings import END_OF_TEXT, TEXT_CONFIG, TURN_END, TURN_START, write_json

SPECIAL_TOKENS = [END_OF_TEXT, TURN_START, TURN_END]

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content']"
    " + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

# Text is cut by this pattern before byte pairs are merged. It is the pattern of
# transformers' Qwen3_5Tokenizer, which ignores the one in tokenizer.json.
WORD_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
KEYWORD_AND_BLANK = re.compile(
    r"\b(?:def|class|import|from|return|if|for|while|with) ", re.ASCII
)


def run(arguments: argparse.Namespace) -> None:
    """Write tokenizer, token streams and corpus.json into the build folder."""
    build = arguments.build
    build.mkdir(parents=True, exist_ok=True)
    parts = {"train": [], "held_out_library": [], "held_out_tests": []}
    chats = []
    rng = random.Random(0)
    for name, text in standard_library_files(Path(sysconfig.get_path("stdlib"))):
        group = "held_out_tests" if is_test(name) else "held_out_library"
        if is_held_out(name):
            parts[group].append(text)
        elif arguments.tests or not is_test(name):
            parts["train"].append(text)
            if not is_test(name):
                chats += [chat_text(*turn) for turn in conversations(text, rng)]
    tokenizer = train_tokenizer(parts["train"], build / "tokenizer")
    facts = {"python": platform.python_version(), "chats": len(chats), "parts": {}}
    for part, documents in parts.items():
        pieces = [[text] for text in documents]
        if part == "train":
            pieces = [cut_at_random(text, rng) for text in documents + chats]
            rng.shuffle(pieces)
        tokens = token_stream(tokenizer, pieces)
        np.save(build / f"{part}.npy", tokens)
        facts["parts"][part] = {
            "files": len(documents),
            "bytes": sum(len(text.encode()) for text in documents),
            "tokens": len(tokens),
        }
    write_json(build / "corpus.json", facts)
    print(json.dumps(facts, indent=2))


def chat_text(question: str, answer: str) -> str:
    """Write a question and its answer in the form of the chat template."""
    return (
        f"{TURN_START}user\n{question}{TURN_END}\n"
        f"{TURN_START}assistant\n{answer}{TURN_END}\n"
    )


def train_tokenizer(texts: list[str], folder: Path):
    """Train a byte-level BPE tokenizer and save it in Hugging Face's format."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TEXT_CONFIG["vocab_size"],
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=TEXT_CONFIG["max_position_embeddings"],
    ).save_pretrained(folder)
    return tokenizer


def cut_at_random(text: str, rng: random.Random) -> list[str]:
    """Cut text where a prompt might end: behind a keyword's blank, or anywhere.

    The pieces are encoded one by one. So the model also sees the last tokens of prompts
    such as "def ", which do not occur inside of longer text.
    """
    ends = [m.end() for m in KEYWORD_AND_BLANK.finditer(text) if rng.random() < 0.1]
    ends += rng.sample(range(len(text)), len(text) // 1000)
    cuts = [0, *sorted(set(ends) - {0}), len(text)]
    return [text[start:end] for start, end in pairwise(cuts) if start < end]


def token_stream(tokenizer, documents: list[list[str]]) -> np.ndarray:
    """Encode documents, which are lists of pieces; <|endoftext|> follows each."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    tokens = []
    for pieces in documents:
        for encoding in tokenizer.encode_batch(pieces, add_special_tokens=False):
            tokens += encoding.ids
        tokens.append(end)
    return np.array(tokens, np.uint16)
