"""Rows of any source: files of every kind, directories, data sets; and every way in which a file can be broken."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Any

import pytest

from spd_lightning.data import reading as module
from spd_lightning.data.reading import read
from spd_lightning.data.sources import Source, parse_sources
from spd_lightning.data.tally import Bad
from spd_lightning.errors import InputError

ROWS = [{"id": str(number), "text": f"row {number} \u00e9\U0001f469"} for number in range(700)]


def lines(rows: list[Any]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def contents(*sources: Source, **options: Any) -> list[Any]:
    return [row.content for row in read(sources, **options)]


def bad(path: Path) -> list[Bad]:
    return [content for content in contents(Source(str(path))) if isinstance(content, Bad)]


# -- kinds of files --------------------------------------------------------------------------------------------------


def write(folder: Path, kind: str) -> Path:
    from datasets import Dataset

    path = folder / f"rows.{kind}"
    if kind == "jsonl":
        path.write_bytes(lines(ROWS))
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress(lines(ROWS)))
    elif kind == "json":
        path.write_text(json.dumps(ROWS, indent=1))
    elif kind == "parquet":
        Dataset.from_list(ROWS).to_parquet(path)
    elif kind == "csv":
        Dataset.from_list(ROWS).to_csv(path)
    else:
        Dataset.from_list(ROWS).save_to_disk(path)
    return path


@pytest.mark.parametrize("streaming", [False, True], ids=["loaded", "streamed"])
@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "json", "parquet", "csv", "saved"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, kind: str, streaming: bool) -> None:
    found = contents(Source(str(write(tmp_path, kind))), streaming=streaming)
    assert [{key: str(row[key]) for key in ("id", "text")} for row in found] == ROWS


def test_a_directory_is_its_files_in_order_without_manifests(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "2.jsonl").write_bytes(lines(ROWS[3:]))
    (tmp_path / "a.jsonl").write_bytes(lines(ROWS[:3]))
    (tmp_path / "manifest.json").write_text("{}")
    (tmp_path / "README.md").write_text("x")
    assert contents(Source(str(tmp_path))) == ROWS


def test_a_directory_of_several_splits_is_read_by_the_files_that_are_named(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for name, rows in (("train_sft-0", ROWS[:30]), ("test_sft-0", ROWS[30:40])):
        (tmp_path / "data" / f"{name}.jsonl").write_bytes(lines(rows))
    given = Source(str(tmp_path), files="data/train_sft-*")
    given.check("data.train")
    assert contents(given) == ROWS[:30]
    for source, says in (
        (Source(str(tmp_path)), "several splits: train_sft-0.jsonl, test_sft-0.jsonl.*files="),
        (Source(str(tmp_path), split="train_sft"), "files have no splits.*files=.train_sft"),
        (Source(str(tmp_path), files="*.parquet"), "no data files named .*parquet"),
        (Source(str(tmp_path), config="all"), "config=all: only hub data sets"),
        (Source(str(tmp_path / "data" / "train_sft-0.jsonl"), files="*"), "files=.*expected a directory"),
    ):
        with pytest.raises(InputError, match=says):
            source.check("data.train")


def test_a_directory_with_files_that_cannot_be_read_is_refused_and_hidden_ones_do_not_count(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(ROWS[:3]))
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "test-run.jsonl").write_bytes(lines(ROWS[3:5]))
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "b.jsonl").write_bytes(lines(ROWS))
    Source(str(tmp_path)).check("data.train")
    assert contents(Source(str(tmp_path))) == ROWS[:5]
    for name in ("c.jsonl.zst", "c.csv.gz", "C.JSONL"):
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(InputError, match=f"{name}, which cannot be read: unpack it"):
            Source(str(tmp_path)).check("data.train")
        (tmp_path / name).unlink()
    (tmp_path / "c.jsonl.zst").write_bytes(b"x")
    Source(str(tmp_path), files="*.jsonl").check("data.train")


def test_a_saved_dictionary_gives_the_split_that_is_named(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    parts = {"train": Dataset.from_list(ROWS[:30]).with_format("numpy"), "test": Dataset.from_list(ROWS[30:40])}
    DatasetDict(parts).save_to_disk(tmp_path / "saved")
    for split, expected in (("train", ROWS[:30]), ("test", ROWS[30:40])):
        source = Source(str(tmp_path / "saved"), split=split)
        source.check("data.train")
        assert contents(source) == expected
    with pytest.raises(InputError, match="split=dev: expected one of train, test"):
        Source(str(tmp_path / "saved"), split="dev").check("data.train")
    (tmp_path / "saved" / "dataset_dict.json").write_text("{}")
    with pytest.raises(InputError, match=r"dataset_dict\.json cannot be read"):
        Source(str(tmp_path / "saved")).check("data.train")


def test_a_path_with_the_signs_of_a_pattern_is_a_path(tmp_path: Path) -> None:
    from datasets import Dataset

    (tmp_path / "run[1]*").mkdir()
    Dataset.from_list(ROWS).to_parquet(tmp_path / "run[1]*" / "x.parquet")
    assert contents(Source(str(tmp_path / "run[1]*"))) == ROWS


def test_a_row_says_where_it_stands(tmp_path: Path) -> None:
    path, table = tmp_path / "x.jsonl", write(tmp_path, "parquet")
    path.write_bytes(b"\n" + lines(ROWS[:2]) + b"\n" + lines(ROWS[2:3]))
    assert [row.place for row in read([Source(str(path))])] == [f"{path}:2", f"{path}:3", f"{path}:5"]
    assert [row.place for row in read([Source(str(table))])][699] == f"{table} row 699"


@pytest.mark.parametrize("block", [1 << 20, 64])
def test_a_json_array_is_read_in_pieces_wherever_they_end(
    tmp_path: Path, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(
        b"\xef\xbb\xbf  [" + b" ,\n ".join(json.dumps(r, ensure_ascii=False).encode() for r in ROWS) + b"]\n"
    )
    monkeypatch.setattr(module, "ARRAY_BLOCK", block)
    assert contents(Source(str(path))) == ROWS


def test_streamed_sources_are_mixed_in_proportion_to_their_size(tmp_path: Path) -> None:
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    paths[0].write_bytes(lines(ROWS[:600]))
    paths[1].write_bytes(lines(ROWS[600:]))
    sources = [Source(str(paths[0])), Source(str(paths[1]), weight=30.0)]  # weights repeat what was read
    found = [row.source for row in read(sources, streaming=True)]
    assert len(found) == 700
    assert sum(found[:350]) == pytest.approx(50, abs=20), "every seventh row, from the first to the last"
    empty = Source(str(tmp_path / "empty.jsonl"))
    Path(empty.path).touch()
    assert len(contents(sources[0], empty, streaming=True)) == 600
    assert found == [row.source for row in read(sources, streaming=True)] != sorted(found)


def test_a_streamed_mixture_of_unknown_size_asks_for_it(tmp_path: Path) -> None:
    packed = tmp_path / "a.jsonl.gz"
    packed.write_bytes(gzip.compress(lines(ROWS)))
    with pytest.raises(InputError, match="number of rows is not known.*give it as rows"):
        contents(Source(str(packed)), Source(str(packed)), streaming=True)
    sized = Source(str(packed), rows=700)
    assert len(contents(sized, sized, streaming=True)) == 1400


# -- broken files ----------------------------------------------------------------------------------------------------


def test_rows_of_a_broken_table_are_not_counted_but_refused_when_they_are_read(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    for content in (b"", b"PAR1 and nothing else PAR1"):
        path.write_bytes(content)
        assert module.count_rows([Source(str(path))]) is None
        with pytest.raises(InputError, match=r"x\.parquet cannot be (read|loaded)"):
            contents(Source(str(path)))


def test_a_truncated_last_line_is_named_and_the_others_are_read(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(lines(ROWS[:5])[:-10])
    (found,) = bad(path)
    assert (found.reason, found.place) == ("truncated last line", f"{path}:5")
    assert contents(Source(str(path)))[:4] == ROWS[:4]


def test_invalid_json_in_the_middle_costs_one_line(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(lines(ROWS[:2]) + b'{"id": 1,, }\n' + b"[1, 2]\n" + lines(ROWS[2:4]))
    first, second = bad(path)
    assert (first.reason, first.place) == ("invalid JSON", f"{path}:3") and "column" in first.detail
    assert (second.reason, second.place) == ("not an object", f"{path}:4") and "list" in second.detail
    assert [row for row in contents(Source(str(path))) if not isinstance(row, Bad)] == ROWS[:4]


def test_bytes_that_are_not_utf8_cost_one_line(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(lines(ROWS[:1]) + b'{"text": "caf\xe9"}\n' + lines(ROWS[1:2]))
    (found,) = bad(path)
    assert (found.reason, found.place) == ("not UTF-8", f"{path}:2") and "0xe9" in found.detail


def test_a_line_beyond_the_limit_is_skipped_without_being_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(lines(ROWS[:1]) + b'{"text": "' + b"x" * 50_000 + b'"}\n' + lines(ROWS[1:2]))
    monkeypatch.setattr(module, "LINE_LIMIT", 4096)
    (found,) = bad(path)
    assert (found.reason, found.place) == ("line too long", f"{path}:2") and "50013 bytes" in found.detail
    assert [row for row in contents(Source(str(path))) if not isinstance(row, Bad)] == ROWS[:2]


def test_a_fault_inside_an_array_is_named_by_its_element(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    whole = json.dumps(ROWS[:3])
    for text, says in (
        (whole[:-1] + ', {"id": oops}, {}]', "element 3 .from 0.: invalid JSON.*one object per line"),
        (whole[:-20], "element 2 .from 0.: invalid JSON"),
        (whole[:-1] + ", " + "[" * 100_000, "element 3 .from 0.: invalid JSON"),
        (f"{whole}\n{whole}", "text after its JSON array of 3 elements"),
    ):
        path.write_text(text)
        with pytest.raises(InputError, match=f"x.json:? {says}"):
            bad(path)


def test_random_damage_never_costs_more_than_its_lines_and_never_crashes(tmp_path: Path) -> None:
    draw, path = random.Random(0), tmp_path / "x.jsonl"
    for _ in range(40):
        data = bytearray(lines(ROWS[:30]))
        hits = {draw.randrange(len(data)) for _ in range(draw.randint(1, 4))}
        for at in hits:
            data[at] = draw.choice(b'\xff\x00"{}[]\\x')
        path.write_bytes(bytes(data))
        found = contents(Source(str(path)))
        whole = [row for row in found if not isinstance(row, Bad) and row in ROWS]
        assert len(whole) >= 30 - 2 * len(hits), "a newline that is hit joins two lines"


def test_files_that_cannot_be_read_end_with_one_line_that_names_them(tmp_path: Path) -> None:
    cut, table = tmp_path / "x.jsonl.gz", tmp_path / "x.parquet"
    cut.write_bytes(gzip.compress(lines(ROWS))[:-200])
    table.write_bytes(b"PAR1 no table")
    for path in (cut, table):
        with pytest.raises(InputError) as caught:
            contents(Source(str(path)))
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)


# -- how sources are written -----------------------------------------------------------------------------------------


def test_the_short_form_names_every_field() -> None:
    text = "org/set,config=all,split=train_sft,revision=abc,files=*.json,weight=2.5,rows=100,prompt=question,response=a"
    assert Source.parse(text) == Source(
        "org/set", "all", "train_sft", "abc", "*.json", 2.5, {"prompt": "question", "response": "a"}, 100
    )
    assert Source.parse("org/set") == Source("org/set") and not Source("org/set").is_local


def test_a_file_with_commas_in_its_name_is_a_file(tmp_path: Path) -> None:
    path = tmp_path / "a,weight=2.jsonl"
    path.write_bytes(lines(ROWS[:1]))
    assert Source.parse(str(path)).path == str(path) and contents(*parse_sources("x", str(path))) == ROWS[:1]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a/b,splitt=x", "'splitt=x'.*config, split"),
        ("a/b,weight=much", "weight='much'.*float"),
        ("a/b,weight=0", "weight=0.0.*positive"),
        ("a/b,weight=nan", "weight=nan.*positive"),
        ("a/b,rows=0", "rows=0.*at least 1"),
        (",split=x", "empty path"),
        ("a/b,split", "'split'.*key=value"),
    ],
)
def test_a_wrong_short_form_is_refused_by_its_part(text: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        Source.parse(text)


def test_what_is_no_data_is_refused_before_it_is_read(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.txt").write_text("hello")
    for path, says in (("none.jsonl", "does not exist"), ("empty", "no data files"), ("x.txt", "ending in .jsonl")):
        with pytest.raises(InputError, match=says) as caught:
            Source(str(tmp_path / path)).check("data.train")
        assert "data.train=" in str(caught.value) and str(tmp_path / path) in str(caught.value)


def test_the_fingerprint_follows_the_files_and_not_the_weight(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(lines(ROWS[:2]))
    before = Source(str(path)).fingerprint()
    assert before == Source(str(path), weight=3.0).fingerprint()
    assert before != Source(str(path), columns={"text": "id"}).fingerprint()
    path.write_bytes(lines(ROWS[:3]))
    assert before != Source(str(path)).fingerprint()
