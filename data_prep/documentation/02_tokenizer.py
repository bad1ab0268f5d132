"""Step 2: a byte-level BPE tokenizer of 4096 entries with a chat template that marks what the assistant said.

4096 entries keep the embedding of the tiny target at a sixth of its weights; a documentation text costs about
one token for 3.3 characters. Digits are split one by one, so that no entry is spent on years and version
numbers. The template wraps every assistant turn, its <|end|> included, in {% generation %}:
apply_chat_template then returns the mask of the tokens that a head is trained on, for any number of turns.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

VOCABULARY = 4096
PAD, USER, ASSISTANT, END, SYSTEM = "<|pad|>", "<|user|>", "<|assistant|>", "<|end|>", "<|system|>"
SPECIAL_TOKENS = [PAD, USER, ASSISTANT, END, SYSTEM]
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ '<|system|>' + message['content'] + '<|end|>' }}"
    "{% elif message['role'] == 'user' %}{{ '<|user|>' + message['content'] + '<|end|>' }}"
    "{% elif message['role'] == 'assistant' %}{{ '<|assistant|>' }}"
    "{% generation %}{{ message['content'] + '<|end|>' }}{% endgeneration %}"
    "{% else %}{{ raise_exception('unknown role: ' + message['role']) }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
# A word or one digit with its leading space, punctuation, line breaks with their indentation.
SPLIT = r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s*\n\s*|\s+(?!\S)|\s+"


def texts_of(path: Path) -> Iterator[str]:
    """Questions and answers of a JSON lines file of conversations."""
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            for message in json.loads(line)["messages"]:
                yield message["content"]


def train(texts: Iterable[str], size: int = VOCABULARY) -> Tokenizer:
    """Byte-level BPE: every text round-trips, nothing is unknown."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=2,
        show_progress=sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def wrap(tokenizer: Tokenizer, max_length: int = 1024):
    """The tokenizer as transformers loads it, chat template included."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        extra_special_tokens=[USER, ASSISTANT, SYSTEM],
        chat_template=CHAT_TEMPLATE,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def check_round_trip(tokenizer, texts: Iterable[str]) -> tuple[int, int]:
    """(characters, tokens) of the texts; ValueError at the first that encode and decode do not give back."""
    characters = tokens = 0
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False)
        if tokenizer.decode(ids) != text:
            raise ValueError(f"does not round-trip: {text[:200]!r} became {tokenizer.decode(ids)[:200]!r}")
        characters += len(text)
        tokens += len(ids)
    return characters, tokens


def save(tokenizer, folder: Path) -> None:
    """Write to a temporary folder, then rename."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    tokenizer.save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Before: 01_corpus.py. Next: python data_prep/documentation/03_target.py --minutes 60",
    )
    parser.add_argument(
        "--corpus",
        type=Path,
        default=Path("build/documentation"),
        help="folder of step 1 (default: %(default)s)",
    )
    parser.add_argument(
        "--size", type=int, default=VOCABULARY, help="entries, special tokens included (default: %(default)s)"
    )
    parser.add_argument("--force", action="store_true", help="train again although the tokenizer exists")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Write CORPUS/tokenizer."""
    args = parse_arguments(argv)
    folder = args.corpus / "tokenizer"
    if folder.exists() and not args.force:
        print(f"{folder} exists: nothing to do (--force runs again)")
        return
    tokenizer = wrap(train(texts_of(args.corpus / "train.jsonl"), args.size))
    characters, tokens = check_round_trip(tokenizer, texts_of(args.corpus / "heldout.jsonl"))
    save(tokenizer, folder)
    print(f"{len(tokenizer)} entries; held-out text: {characters / tokens:.2f} characters per token, round trip exact")


if __name__ == "__main__":
    main()
