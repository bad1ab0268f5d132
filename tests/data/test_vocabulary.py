"""Draft vocabularies: what is counted, what is chosen, and that a head takes the file."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from spd_lightning.data import vocabulary
from spd_lightning.data.cleaning import Cleaner, Cleaning, check_sources
from spd_lightning.data.store import Encoding, TokenStore, open_store
from spd_lightning.data.vocabulary import (
    DraftVocabulary,
    check_size,
    constant_speedup,
    label_counts,
    ranking,
    size_for_coverage,
    table_sizes,
    time_lm_head,
    write_vocabulary,
)
from spd_lightning.errors import InputError
from spd_lightning.head.loading import new_head
from spd_lightning.head.vocabulary import read_draft_vocabulary
from spd_lightning.target.loading import load_target

counts_and_always = st.integers(2, 40).flatmap(
    lambda V: st.tuples(
        arrays.arrays(np.int64, V, elements=st.integers(0, 9)).filter(lambda counts: bool(counts.any())),
        st.sets(st.integers(0, V - 1), max_size=5),
    )
)
shares = st.integers(1, 1000).map(lambda k: k / 1000)


def store_of(source: str, tokenizer: str, folder: Path, max_length: int = 512) -> TokenStore:
    cleaner = Cleaner(check_sources("SOURCE", [source]), Cleaning(max_bad_share=1.0))
    return open_store(Encoding(cleaner, tokenizer, max_length=max_length), folder, "SOURCE")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def documentation(folder: Path) -> TokenStore:
    return store_of("documentation:heldout", "tiny", folder)


def slowly_counted(store: TokenStore) -> Counter[int]:
    """Token by token, by the definition: labelled, and not the first of its turn."""
    counts: Counter[int] = Counter()
    for sample in store:
        starts = {start for start, _ in sample.turns}
        for position, (token, labelled) in enumerate(zip(sample.ids.tolist(), sample.labelled, strict=True)):
            if labelled and position not in starts:
                counts[token] += 1
    return counts


def test_counts_are_those_of_every_drafted_label(documentation: TokenStore):
    counts = label_counts(documentation, 4096)
    assert {int(token): int(counts[token]) for token in np.flatnonzero(counts)} == slowly_counted(documentation)
    turns = sum(len(sample.turns) for sample in documentation)
    assert counts.sum() == documentation.manifest["labels"] - turns


def test_counts_hold_over_many_batches_several_turns_and_turns_of_one_token(
    tmp_path: Path, model_folder: Path, make_conversations: Callable[..., Any], write_lines: Callable[..., Path]
):
    conversations = make_conversations(600, 5, turns=(1, 2, 3))
    rows: list[Any] = [{"messages": messages} for messages in conversations]
    rows += [{"text": "the file opens the path " * 30}]
    store = store_of(str(write_lines(tmp_path / "chats.jsonl", rows)), str(model_folder), tmp_path, max_length=28)
    assert any(stop - start == 1 for sample in store for start, stop in sample.turns), "the cut leaves no such turn"
    assert max(len(sample.turns) for sample in store) > 1
    counts = label_counts(store, 300)
    assert {int(token): int(counts[token]) for token in np.flatnonzero(counts)} == slowly_counted(store)


def test_ids_outside_the_vocabulary_are_refused(documentation: TokenStore):
    with pytest.raises(InputError, match=r"--tokenizer tiny makes id \d+, but the vocabulary has 1000 ids"):
        label_counts(documentation, 1000)


@given(counts_and_always)
def test_a_ranking_takes_special_tokens_then_frequent_ones_and_breaks_ties_by_id(given_: tuple[np.ndarray, set[int]]):
    counts, always = given_
    order = ranking(counts, always).tolist()
    assert sorted(order) == list(range(len(counts)))
    assert set(order[: len(always)]) == always
    rest = order[len(always) :]
    assert rest == sorted(rest, key=lambda token: (-counts[token], token))


@given(counts_and_always, shares)
def test_a_size_for_a_coverage_reaches_it_and_one_id_less_does_not(given_: tuple[np.ndarray, set[int]], share: float):
    counts, always = given_
    order = ranking(counts, always)
    size = size_for_coverage(counts, order, share)
    total, wanted = int(counts.sum()), round(share * 1000)
    assert 1000 * int(counts[order[:size]].sum()) >= wanted * total
    assert 1000 * int(counts[order[: size - 1]].sum()) < wanted * total


@given(counts_and_always, shares, shares)
def test_more_coverage_never_takes_fewer_ids_and_the_smaller_set_is_part_of_the_larger(
    given_: tuple[np.ndarray, set[int]], a: float, b: float
):
    counts, always = given_
    order = ranking(counts, always)
    small, large = sorted(size_for_coverage(counts, order, share) for share in (a, b))
    assert (size_for_coverage(counts, order, a) <= size_for_coverage(counts, order, b)) or a >= b
    chosen = DraftVocabulary(order, large, counts, counts)
    assert set(DraftVocabulary(order, small, counts, counts).token_ids) <= set(chosen.token_ids)
    assert chosen.coverage(small)[0] <= chosen.coverage()[0] <= 1


@given(counts_and_always)
def test_without_special_tokens_no_other_set_of_the_same_size_covers_more(given_: tuple[np.ndarray, set[int]]):
    counts, _ = given_
    order = ranking(counts, ())
    for size in range(1, len(counts) + 1):
        assert counts[order[:size]].sum() == np.sort(counts)[::-1][:size].sum()


def test_a_coverage_means_the_decimal_that_was_written():
    counts = np.array([7, 93])  # 0.07 * 100 is 7.000000000000001
    assert size_for_coverage(counts, np.array([0, 1]), 0.07) == 1


def test_full_coverage_takes_every_id_that_occurs_and_no_other():
    counts = np.array([0, 3, 0, 1])
    assert size_for_coverage(counts, ranking(counts, ()), 1.0) == 2


def test_a_size_must_lie_between_the_special_tokens_and_the_whole_vocabulary():
    check_size(3, (0, 1, 2), 3)
    with pytest.raises(InputError, match="--size 61: expected at most 60"):
        check_size(61, (), 60)
    with pytest.raises(InputError, match="--size 2: expected at least 3, the special tokens"):
        check_size(2, (0, 1, 2), 60)


def test_table_sizes_hold_the_chosen_one_the_whole_vocabulary_and_powers_of_two():
    assert table_sizes(4096, 5, 1000) == [256, 512, 1000, 1024, 2048, 4096]
    assert table_sizes(4096, 300, 4096) == [512, 1024, 2048, 4096]
    assert table_sizes(60, 5, 10) == [10, 60]
    sizes = table_sizes(151936, 26, 32768)
    assert sizes[0] == 512 and sizes[-2:] == [131072, 151936] and len(sizes) <= 11


@pytest.mark.parametrize(("p", "S"), [(0.80, 3.33), (0.85, 3.90), (0.90, 4.71), (1.0, 8.0)])
def test_the_speedup_of_a_constant_acceptance_is_that_of_the_method(p: float, S: float):
    assert constant_speedup(8, p) == pytest.approx(S, abs=0.005)


def test_the_lm_head_is_timed_for_every_size():
    timing = time_lm_head(16, [4, 4096], budget=0.0)
    assert timing is not None and timing.threads >= 1
    assert set(timing.seconds) == {4, 4096}
    assert 0 < timing.seconds[4] < timing.seconds[4096]


def test_an_lm_head_that_does_not_fit_into_memory_is_not_timed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(vocabulary, "_free_memory", lambda: 8 * 16 * 4096 - 1.0)
    assert time_lm_head(16, [4, 4096], budget=0.0) is None


def test_a_head_takes_the_file_and_proposes_its_ids(tmp_path: Path, documentation: TokenStore):
    counts = label_counts(documentation, 4096)
    chosen = DraftVocabulary(ranking(counts, (0, 1, 2, 3, 4)), 300, counts, counts)
    path = tmp_path / "vocabulary.json"
    write_vocabulary(path, chosen, {"sources": ["documentation:heldout"]})
    ids = read_draft_vocabulary(path, 4096)
    assert list(ids) == chosen.token_ids.tolist() == sorted(set(ids)) and set(range(5)) <= set(ids)
    content = json.loads(path.read_text(encoding="utf-8"))
    assert (content["size"], content["vocab_size"]) == (300, 4096)
    assert dict(zip(content["token_ids"], content["counts"], strict=True)) == {i: counts[i] for i in ids}
    assert content["coverage"]["train"] == pytest.approx(sum(content["counts"]) / counts.sum())
    target = load_target("tiny", num_stages=4)
    head = new_head(target, draft_token_ids=ids)
    assert head.lm_head.weight.shape == (300, 256) and head.config.draft_token_ids == ids
    assert bool((head.lm_head.weight.cpu() == target.lm_head.weight[list(ids)].to(head.lm_head.weight.dtype)).all())


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path: Path):
    counts = np.array([1, 1])
    (tmp_path / "taken.json").mkdir()
    with pytest.raises(InputError, match="--out .*taken.json cannot be written"):
        write_vocabulary(tmp_path / "taken.json", DraftVocabulary(np.array([0, 1]), 1, counts, counts), {})
    assert [path.name for path in tmp_path.iterdir()] == ["taken.json"]


def test_the_reader_names_the_field_it_was_given(tmp_path: Path):
    path = tmp_path / "v.json"
    for content, says in (("{", "cannot be read"), ("[]", "token_ids"), ('{"token_ids": [9]}', "0..8")):
        path.write_text(content)
        with pytest.raises(InputError) as caught:
            read_draft_vocabulary(path, 9, name="model.head.draft_vocabulary")
        assert str(caught.value).startswith(f"model.head.draft_vocabulary={str(path)!r}") and says in str(caught.value)
