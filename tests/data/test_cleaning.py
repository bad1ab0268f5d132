"""The split, benchmark prompts, the tally, and the share of bad rows that ends a run."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from spd_lightning.data.cleaning import Cleaner, Cleaning
from spd_lightning.data.conversations import Conversation
from spd_lightning.data.reading import Row
from spd_lightning.data.sources import Source
from spd_lightning.data.tally import ENOUGH, Bad, Tally
from spd_lightning.errors import InputError

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"
WORDS = [a + b for a in ("al", "be", "ga", "del", "eps") for b in ("pha", "ta", "ma", "lon")]


def chat(question: str, answer: str = "yes") -> dict[str, object]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def rows(*questions: str) -> list[Row]:
    return [Row(0, f"x:{number}", chat(question)) for number, question in enumerate(questions, 1)]


def cleaner(**options: object) -> Cleaner:
    return Cleaner((Source("x"),), **options)  # type: ignore[arg-type]


def test_the_two_sides_of_a_split_share_nothing_and_miss_nothing() -> None:
    questions = [f"question {number}" for number in range(2000)]
    kept = {
        part: {found.opening for _, found in cleaner(part=part, heldout_share=0.1)(rows(*questions))[0]}
        for part in ("train", "heldout", "all")
    }
    assert kept["train"] | kept["heldout"] == kept["all"] == set(questions) and not kept["train"] & kept["heldout"]
    assert len(kept["heldout"]) == pytest.approx(200, abs=45)


def test_conversations_that_open_alike_fall_on_the_same_side() -> None:
    split = cleaner(heldout_share=0.5)
    system = {"role": "system", "content": "Be short."}
    for number in range(50):
        plain = chat(f"question {number}")["messages"]
        spaced = chat(f"  Question\n{number} ", "no")["messages"]
        sides = {
            split.side(Conversation("", tuple(messages)))  # type: ignore[arg-type]
            for messages in (plain, spaced, [system, *plain])  # type: ignore[misc]
        }
        assert len(sides) == 1


def test_a_larger_share_holds_out_what_a_smaller_one_did() -> None:
    found = [Conversation("", (), text=f"text {number}") for number in range(300)]
    small, large = cleaner(heldout_share=0.1), cleaner(heldout_share=0.3)
    assert all(large.side(each) == "heldout" for each in found if small.side(each) == "heldout")


@pytest.fixture
def benchmark(tmp_path: Path) -> str:
    draw = random.Random(0)
    questions = [" ".join(draw.choices(WORDS, k=30)) for _ in range(20)] + ["What is the capital of France?"]
    path = tmp_path / "bench.jsonl"
    path.write_text("".join(json.dumps({"question": question}) + "\n" for question in questions))
    return str(path)


def questions_of(path: str) -> list[str]:
    return [json.loads(line)["question"] for line in Path(path).read_text().splitlines()]


def test_shared_ngrams_are_found_anywhere_and_shorter_ones_are_not(benchmark: str) -> None:
    long, short = questions_of(benchmark)[3].split(), questions_of(benchmark)[-1]
    inside = "Tell me: " + ", ".join(long[5:18]).upper() + "; please."  # 13 words, other case and punctuation
    part = " ".join(long[5:17])  # 12 words
    clean = cleaner(cleaning=Cleaning(decontaminate=[benchmark]))
    kept, tally = clean(rows(inside, part, short, f"Please say: {short}", "what is the CAPITAL of france"))
    assert [row.place for row, _ in kept] == ["x:2", "x:4"], "a short question must be the whole turn"
    assert tally.left_out == {"contains a prompt of bench.jsonl": 3} and tally.bad_share == 0
    assert len(cleaner(cleaning=Cleaning(decontaminate=[benchmark], ngram=12))(rows(part))[0]) == 0


def test_an_answer_that_quotes_a_benchmark_counts_too(benchmark: str) -> None:
    row = Row(0, "x:1", chat("Say something.", f"Well: {questions_of(benchmark)[0]}"))
    assert cleaner(cleaning=Cleaning(decontaminate=[benchmark]))([row])[0] == []


def test_benchmarks_that_hold_no_question_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "b.jsonl"
    path.write_text('{"x": 1}\n')
    with pytest.raises(InputError, match=r"decontaminate=.*b\.jsonl.*no question"):
        cleaner(cleaning=Cleaning(decontaminate=[str(path)]))(rows("hello"))
    with pytest.raises(InputError, match=r"decontaminate=.*none\.jsonl.*does not exist"):
        cleaner(cleaning=Cleaning(decontaminate=[str(tmp_path / "none.jsonl")]))(rows("hello"))


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared benchmark files")
def test_the_prompts_of_real_benchmarks_are_all_found() -> None:
    for name, field in (("gsm8k/test", "question"), ("human_eval/HumanEval", "prompt")):
        path = SHARED / f"{name}.jsonl"
        prompts = [json.loads(line)[field] for line in path.read_text().splitlines()]
        clean = cleaner(cleaning=Cleaning(decontaminate=[str(path)]))
        assert clean(rows(*prompts))[0] == []
        assert len(clean(rows(*(f"question {number}" for number in range(50))))[0]) == 50


def test_a_benchmark_whose_messages_are_no_list_is_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "bench.jsonl"
    path.write_text('{"messages": "text"}\n{"messages": ["text"]}\n')
    with pytest.raises(InputError, match="no question found"):
        Cleaner((), Cleaning(decontaminate=[str(path)])).contaminated(Conversation("", text="text"))


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(InputError, match="max_bad_share=1.5"):
        Cleaning(max_bad_share=1.5)
    with pytest.raises(InputError, match="ngram=2"):
        Cleaning(ngram=2)


# -- the tally -------------------------------------------------------------------------------------------------------


def tallied(good: int, bad: int, reason: str = "invalid JSON") -> Tally:
    tally = Tally(read=good + bad, kept=good)
    for number in range(bad):
        tally.add_bad(Bad(reason, f"x:{number}", "oops"))
    return tally


def test_tallies_add_up_and_keep_the_first_examples() -> None:
    total = Tally()
    for number in range(5):
        total.add(tallied(10, 2, "even" if number % 2 == 0 else "odd"))
    assert (total.read, total.kept, total.bad) == (60, 50, {"even": 6, "odd": 4})
    assert [len(examples) for examples in total.examples.values()] == [3, 3]
    assert Tally.from_dict(json.loads(json.dumps(total.as_dict()))) == total
    assert any("6 x even, e.g. x:0: even (oops)" in line for line in total.lines())


def test_too_large_a_share_of_bad_rows_is_an_error_with_counts_and_examples() -> None:
    tallied(95, 5).check("data.train", 0.05, "--max-bad-share")
    with pytest.raises(InputError) as caught:
        tallied(94, 6).check("data.train", 0.05, "--max-bad-share")
    message = str(caught.value)
    for part in ("data.train: 6 of 100 rows", "6.0%", "--max-bad-share allows 5.0%", "6 x invalid JSON", "x:0: inv"):
        assert part in message


def test_reading_stops_early_only_when_enough_rows_were_seen() -> None:
    tallied(1, ENOUGH - 2).check("x", 0.05, "f", over=False)
    with pytest.raises(InputError):
        tallied(1, ENOUGH).check("x", 0.05, "f", over=False)
