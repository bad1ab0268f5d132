"""The embedded documentation data and target: the split leaks nothing, the template marks the answers."""

from __future__ import annotations

import gzip
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
STEPS = REPOSITORY / "data_prep" / "documentation"
EMBEDDED = REPOSITORY / "src" / "spd_lightning" / "embedded"


def step(name: str) -> ModuleType:
    """A numbered script as a module."""
    key = "documentation_" + name
    if key not in sys.modules:
        spec = importlib.util.spec_from_file_location(key, STEPS / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[key] = module
        spec.loader.exec_module(module)
    return sys.modules[key]


corpus, tokenizer_step, embed = step("01_corpus"), step("02_tokenizer"), step("05_embed")

SHARED = "Return the weighted mean of the given values along an axis of the array, ignoring gaps."
FILE = '''"""A module about shapes and the ways in which they are measured."""

class Shape:
    """A shape in the plane, given by the list of its corners."""

    def area(self):
        """Return the area of the shape, which is never negative."""

    def {name}(self):
        """{text}

        Variant {number} of the text.
        """

if True:
    async def fetch():
        """Read a shape from the given stream and return it."""

def short():
    """Too short."""
'''


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty small files, half of whose methods share a first paragraph under different names."""
    root = tmp_path_factory.mktemp("site")
    for i in range(40):
        text = (
            SHARED if i % 2 else f"Do the thing that is known as {chr(97 + i % 26) * 5} to the people of the village."
        )
        (root / f"part{i}.py").write_text(FILE.format(name=f"method_{i}", text=text, number="x" * i), encoding="utf-8")
    (root / "broken.py").write_text("def (:", encoding="utf-8")
    (root / "binary.py").write_bytes(b"\xff\xfe\x00")
    return root


@pytest.fixture(scope="module")
def samples(tree: Path) -> list[dict]:
    files = tuple(sorted(p.name for p in tree.iterdir()))
    return list(corpus.samples_of_package(corpus.Package("fake", "1", "MIT", tree, files)))


def answer(sample: dict) -> str:
    return sample["messages"][-1]["content"]


def assert_disjoint(train: list[dict], heldout: list[dict]) -> None:
    """No symbol, no text and no long first paragraph on both sides."""
    assert not {corpus.symbol(s) for s in train} & {corpus.symbol(s) for s in heldout}
    assert not {corpus.normalise(answer(s)) for s in train} & {corpus.normalise(answer(s)) for s in heldout}
    long = [{p for s in side if len(p := corpus.first_paragraph(answer(s))) > 60} for side in (train, heldout)]
    assert not long[0] & long[1]


def test_every_kind_of_symbol_is_found_and_broken_files_are_skipped(samples: list[dict]) -> None:
    ids = {s["id"] for s in samples}
    assert {"part0", "part0.Shape", "part0.Shape.area", "part0.Shape.method_0", "part0.fetch"} <= ids
    assert not any("short" in i or "broken" in i or "binary" in i for i in ids)


def test_the_question_names_the_symbol_and_its_module(samples: list[dict]) -> None:
    for sample in samples:
        assert sample["id"].split(".")[0] in sample["messages"][0]["content"]
        assert sample["id"].split(".")[-1] in sample["messages"][0]["content"]


def test_split_is_disjoint_by_symbol_text_and_first_paragraph(samples: list[dict]) -> None:
    train, heldout = corpus.split(samples, share=0.4)
    assert train and heldout
    assert_disjoint(train, heldout)


def test_a_first_paragraph_shared_with_training_leaves_the_heldout_part(samples: list[dict]) -> None:
    train, heldout = corpus.split(samples, share=0.4)
    assert any(answer(s).startswith(SHARED) for s in train)
    assert not any(answer(s).startswith(SHARED) for s in heldout)


def test_copies_of_a_text_are_kept_once(samples: list[dict]) -> None:
    train, heldout = corpus.split(samples, share=0.4)
    texts = [corpus.normalise(answer(s)) for s in train + heldout]
    assert len(texts) == len(set(texts))


def test_the_split_does_not_depend_on_the_order(samples: list[dict]) -> None:
    def sides(rows: list[dict]) -> list[set[str]]:
        return [{corpus.symbol(s) for s in side} for side in corpus.split(rows, share=0.4)]

    forward, backward = sides(samples), sides(samples[::-1])
    assert not forward[0] & backward[1] and not forward[1] & backward[0]


@pytest.mark.parametrize(
    ("raw", "kept"),
    [
        ("Return the sum of the values that are given to it.\n", True),
        ("Short one.", False),
        ("Copyright 2020 by the authors of this module, who want to be named.", False),
        ("Write to someone@example.com if the function does not work as it should.", False),
        ("\u8fd4\u56de\u7ed9\u5b9a\u503c\u7684\u603b\u548c" * 10, False),
        ("0101 1100 0110 1010 1111 0000 0101 1100 0110 1010 1111 0000", False),
        ("The text is broken by a null \x00 character in the middle of it.", False),
    ],
)
def test_cleaning_keeps_english_and_drops_the_rest(raw: str, kept: bool) -> None:
    assert (corpus.clean(raw) is not None) == kept


def test_cleaning_unindents_folds_blank_lines_and_cuts_at_a_paragraph() -> None:
    paragraph = "This is a line of the text that is long enough to count. " * 10
    text = corpus.clean(f"First line of the text and of the whole.\n\n\n\n    {paragraph}\n\n    " + paragraph * 4)
    assert text == "First line of the text and of the whole.\n\n" + paragraph.strip()
    assert corpus.cut_at_paragraph("a" * 50, 40) == ""


@pytest.mark.parametrize(
    ("text", "permissive"),
    [
        ("MIT", True),
        ("Apache-2.0 OR BSD-2-Clause", True),
        ("BSD License", True),
        ("PSF-2.0", True),
        ("MPL-2.0 AND MIT", False),
        ("GNU GPL v3", False),
        ("unknown", False),
        ("MIT AND Strange License", False),
    ],
)
def test_only_permissive_licences_are_taken(text: str, permissive: bool) -> None:
    assert corpus.is_permissive(text) == permissive


@pytest.fixture(scope="module")
def tokenizer(samples: list[dict], tmp_path_factory: pytest.TempPathFactory):
    """A small tokenizer, saved and loaded again."""
    from transformers import AutoTokenizer

    texts = [m["content"] for s in samples for m in s["messages"]]
    folder = tmp_path_factory.mktemp("tokenizer") / "saved"
    tokenizer_step.save(tokenizer_step.wrap(tokenizer_step.train(texts, size=400)), folder)
    return AutoTokenizer.from_pretrained(folder)


CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What does `area` do?"},
    {"role": "assistant", "content": "It returns  the area.\n\n    >>> area(12)\n"},
    {"role": "user", "content": "And \u00e9\U0001f600?"},
    {"role": "assistant", "content": "Nothing."},
]


def labelled(tokenizer, messages: list[dict]) -> str:
    encoded = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    pairs = zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)
    return tokenizer.decode([token for token, mask in pairs if mask])


@pytest.mark.parametrize("messages", [CONVERSATION, CONVERSATION[1:3], CONVERSATION[1:]])
def test_the_labelled_tokens_are_the_answers_and_their_end(tokenizer, messages: list[dict]) -> None:
    expected = "".join(m["content"] + tokenizer.eos_token for m in messages if m["role"] == "assistant")
    assert labelled(tokenizer, messages) == expected


def test_the_generation_prompt_is_a_prefix_of_the_whole_conversation(tokenizer) -> None:
    prompt = tokenizer.apply_chat_template(CONVERSATION[:2], add_generation_prompt=True, return_dict=True)["input_ids"]
    whole = tokenizer.apply_chat_template(CONVERSATION[:3], return_dict=True)["input_ids"]
    assert whole[: len(prompt)] == prompt


def test_every_text_round_trips(tokenizer) -> None:
    texts = [m["content"] for m in CONVERSATION] + [
        "\t x\r\n\n  y \u4e2d 3.14159  ",
        " leading",
        "a . b , c 's",
    ]
    tokenizer_step.check_round_trip(tokenizer, texts)


def test_a_system_message_is_optional_and_an_unknown_role_is_refused(tokenizer) -> None:
    assert tokenizer.apply_chat_template(CONVERSATION[1:2], tokenize=False) == "<|user|>What does `area` do?<|end|>"
    with pytest.raises(Exception, match="unknown role"):
        tokenizer.apply_chat_template([{"role": "poet", "content": "x"}], tokenize=False)


def test_the_same_conversations_give_the_same_bytes(samples: list[dict], tmp_path: Path) -> None:
    corpus.write_lines(tmp_path / "a.jsonl", samples)
    corpus.write_lines(tmp_path / "b.jsonl", samples[::-1])
    first, second = (embed.compress(embed.choose(tmp_path / f"{x}.jsonl", 50)) for x in "ab")
    assert first == second


def test_the_repetition_rate_counts_returning_four_grams() -> None:
    report = step("04_report")
    assert report.repetition_rate([[1, 2, 3, 4, 5, 6]]) == 0
    assert report.repetition_rate([[1, 2, 3, 4, 1, 2, 3, 4]]) == 1 / 5
    assert report.repetition_rate([[7] * 8]) == 4 / 5


def test_the_fast_loss_and_attention_of_training_equal_the_plain_ones() -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    target = step("03_target")
    sizes = {
        "vocab_size": 40,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "head_dim": 4,
    }
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True)
    fast = target.new_model(config, seed=1)
    plain = LlamaForCausalLM(LlamaConfig.from_dict(fast.config.to_diff_dict()))
    plain.load_state_dict(fast.state_dict())
    ids = target.pad([[5, 6, 7, 8, 9, 5, 6], [9, 8, 7]], pad_id=0)
    loss, count = target.loss_of(fast, ids, pad_id=0)
    labels = ids.masked_fill(ids == 0, -100)
    expected = plain(input_ids=ids, labels=labels).loss
    assert count == 8
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    for a, b in zip(fast.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_batches_cover_the_epoch_and_repeat_exactly() -> None:
    target = step("03_target")
    sequences = [[i] * (10 + i % 50) for i in range(1, 200)]
    first, again, later = (target.batches_of_epoch(sequences, epoch, 400, seed=3) for epoch in (0, 0, 1))
    assert first == again != later
    assert {t for batch in first for ids in batch for t in ids} == set(range(1, 200))
    assert all(len(batch) * max(map(len, batch)) <= 400 or len(batch) == 1 for batch in first)


def read(path: Path) -> list[dict]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


@pytest.mark.skipif(not (EMBEDDED / "documentation" / "train.jsonl.gz").exists(), reason="data not made yet")
def test_the_shipped_conversations_are_disjoint_and_small() -> None:
    folder = EMBEDDED / "documentation"
    train, heldout = read(folder / "train.jsonl.gz"), read(folder / "heldout.jsonl.gz")
    assert len(train) >= 8000 and len(heldout) >= 300
    assert (folder / "train.jsonl.gz").stat().st_size <= 1_600_000
    assert_disjoint(train, heldout)
    assert all(embed.well_formed(s) and [m["role"] for m in s["messages"]] == ["user", "assistant"] for s in train)


@pytest.mark.skipif(not (EMBEDDED / "target" / "model.safetensors").exists(), reason="target not made yet")
def test_the_shipped_target_is_small_and_its_template_marks_answers() -> None:
    from transformers import AutoConfig, AutoTokenizer

    folder = EMBEDDED / "target"
    assert (folder / "model.safetensors").stat().st_size <= 12_000_000
    shipped = AutoTokenizer.from_pretrained(folder)
    config = AutoConfig.from_pretrained(folder)
    assert (config.vocab_size, config.eos_token_id) == (len(shipped), shipped.eos_token_id)
    assert labelled(shipped, CONVERSATION) == "It returns  the area.\n\n    >>> area(12)\n<|end|>Nothing.<|end|>"
