"""Small Hugging Face tokenizers of the kinds that models have."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# As in Qwen3's tokenizer.json.
QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEXTS = [
    "The quick brown fox jumps over the lazy dog, and the dog does not mind the fox at all. ",
    "def encode(text: str) -> list[int]:\n    return [ord(letter) for letter in text]\n",
    "Größe, Maß und Übung; L'été où naît le cœur; año, niño; Привет, мир; 汉字とかな; שלום עולם. ",
]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_level(
    folder: Path,
    vocab_size: int = 400,
    *,
    style: str = "qwen",
    eos: str | None = "<|im_end|>",
    model_vocab: int = 0,
    more_special: Sequence[str] = (),
) -> Path:
    """A byte-level BPE of a style: `qwen` (a pattern of its own, NFC), `gpt2` (ByteLevel's pattern).

    Args:
        model_vocab: the vocab_size of the config.json beside it; 0: the tokenizer's own size.
        more_special: special tokens besides those of ChatML.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    if style == "qwen":
        split = pre_tokenizers.Split(Regex(QWEN_PATTERN), "isolated", False)
        byte = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *more_special]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, show_progress=False, special_tokens=special, initial_alphabet=alphabet
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    return save(folder, tokenizer, model_vocab or tokenizer.get_vocab_size(), eos_token=eos)


def sentencepiece_bpe(folder: Path, vocab_size: int = 400) -> Path:
    """A BPE of characters that falls back to bytes, as Llama 2's and Mistral 7B's: spaces are written as letters."""
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers

    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, show_progress=False, special_tokens=special)
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    return save(folder, tokenizer, tokenizer.get_vocab_size(), eos_token="</s>")


def sentencepiece_model(folder: Path, kind: str = "bpe", *, add_dummy_prefix: bool = True, **config: Any) -> Any:
    """A folder with a `tokenizer.model` that SentencePiece trained, as Llama 2 came, and no `tokenizer.json`.

    Args:
        kind: `bpe` or `unigram`; both fall back to bytes.
        config: more of `tokenizer_config.json`.

    Returns:
        the SentencePieceProcessor, whose ids are the right ones.
    """
    from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

    folder.mkdir(parents=True, exist_ok=True)
    SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 3),
        model_prefix=str(folder / "tokenizer"),
        model_type=kind,
        vocab_size=380,
        byte_fallback=True,
        add_dummy_prefix=add_dummy_prefix,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()
    tokenizer_config = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config | config))
    processor = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": processor.vocab_size()}))
    return processor


def words(folder: Path, vocab: list[str], vocab_size: int, eos: str | None = "<eos>") -> Path:
    """Write a word tokenizer, which fastokens does not support. Its unknown word is the second."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(vocab)}, unk_token=vocab[1]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return save(folder, tokenizer, vocab_size, eos_token=eos)


def save(folder: Path, tokenizer: Any, vocab_size: int, **options: Any) -> Path:
    """A model's folder: the tokenizer as transformers saves it, and a config.json."""
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options)
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3", "vocab_size": vocab_size}))
    return folder


def read_chat_template(name: str) -> str:
    """Return the chat template of a released model, unchanged, as trl ships it (requirements/test-only.in)."""
    return (Path(sys.prefix) / "test-only" / "trl" / "chat_templates" / f"{name}.jinja").read_text()


def chat_template(folder: Path, name: str, bos: str | None = None) -> None:
    """Give a folder the chat template of a released model, and a BOS token."""
    (folder / "chat_template.jinja").write_text(read_chat_template(name))
    if bos is not None:
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"bos_token": bos}))
