"""Responses by a model in this process: a tiny random one on disk, through the real command."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import families
import pytest

from spd_lightning import cli
from spd_lightning.data.conversations import Conversation
from spd_lightning.data.dialogue import Answer, Dialogue, Sampling, Thoughts, Unit, Written
from spd_lightning.errors import InputError

GREEDY = ("--temperature", "0")
WARM = ("--temperature", "1.5")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, make_conversations, write_lines) -> Path:
    """26 conversations of one or two rounds, of very different lengths."""
    given = make_conversations(26, 3, words=30)
    return write_lines(tmp_path_factory.mktemp("in") / "in.jsonl", ({"messages": messages} for messages in given))


@pytest.fixture
def command(corpus: Path, model_folder: Path, tmp_path: Path) -> Callable[..., Path]:
    """Runs the command into a folder of this name and returns it."""

    def run(name: str, *further: str, source: Path = corpus, status: int = 0) -> Path:
        arguments = ["--target", str(model_folder), "--max-new-tokens", "16", "--batch-size", "4"]
        out = tmp_path / name
        assert cli.main(["data", "regenerate", str(source), *arguments, "--out", str(out), *further]) == status
        return out

    return run


@pytest.fixture(scope="module")
def loaded(model_folder: Path) -> tuple[Any, Any]:
    """The model and its tokenizer."""
    from spd_lightning.target.loading import load_target, load_tokenizer

    return load_target(model_folder), load_tokenizer(model_folder)


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "train.jsonl").read_text(encoding="utf-8").splitlines()]


def texts(folder: Path) -> bytes:
    return (folder / "train.jsonl").read_bytes()


def manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "manifest.json").read_text(encoding="utf-8"))


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


# -- the text --------------------------------------------------------------------------------------------------------


def test_each_turn_is_what_generate_makes_of_the_new_turns_before_it(command, corpus, loaded):
    import torch

    target, tokenizer = loaded
    found = rows(command("out", *GREEDY))
    given = [json.loads(line)["messages"] for line in corpus.read_text().splitlines()]
    assert [[m["role"] for m in row["messages"]] for row in found] == [[m["role"] for m in each] for each in given]
    several = 0
    for row, before in zip(found, given, strict=True):
        history: list[dict[str, str]] = []
        for message, old in zip(row["messages"], before, strict=True):
            if message["role"] == "assistant":
                text = tokenizer.apply_chat_template(history, tokenize=False, add_generation_prompt=True)
                ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
                with torch.inference_mode():
                    made = target.model.generate(
                        ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False, pad_token_id=0
                    )
                assert message["content"] == tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
                assert message["content"] != old["content"]
            else:
                assert message == old
            history.append(message)
        several += sum(m["role"] == "assistant" for m in history) > 1
    assert several > 5


def test_batches_of_any_size_give_the_same_greedy_text(command):
    one, four, all_at_once = (command(f"out{size}", *GREEDY, "--batch-size", str(size)) for size in (1, 4, 64))
    assert texts(one) == texts(four) == texts(all_at_once)


@pytest.mark.parametrize("kind", families.FAMILIES)
def test_padding_on_the_left_changes_no_greedy_text_of_any_family(make_target, loaded, kind):
    _, tokenizer = loaded
    writer = writer_of((make_target(kind, num_layers=5, vocab=len(tokenizer), spread=0.1), tokenizer))
    asked = ["path", "the value of a list returns to the file", "opens a line", "module " * 20, "reads", "in " * 9]
    chats = [[{"role": "user", "content": text}, {"role": "assistant", "content": "old"}] for text in asked]
    together = [said(record) for record in written(writer, *chats)]
    assert together == [said(written(writer, chat)[0]) for chat in chats]
    assert len({text for text in together if text}) > 1


def said(record: dict[str, Any]) -> str | None:
    """The last response; None where it was empty."""
    return record["row"] and record["row"]["messages"][-1]["content"]


def test_sampled_text_repeats_with_its_seed_and_changes_with_another(command):
    assert texts(command("a", *WARM)) == texts(command("b", *WARM))
    assert texts(command("a", *WARM)) != texts(command("c", *WARM, "--seed", "1"))


def test_temperature_alone_leaves_out_no_token(make_target, loaded):
    import torch

    _, tokenizer = loaded
    target = make_target("llama", num_layers=2, vocab=len(tokenizer), spread=0.02)  # hardly prefers any token
    tokens: list[torch.Tensor] = []
    generate = target.model.generate

    def recorded(ids, **further):
        tokens.append(generate(ids, **further))
        return tokens[-1]

    target.model.generate = recorded
    chats = [[{"role": "user", "content": word}, {"role": "assistant", "content": "old"}] for word in "abcdef" * 4]
    written(writer_of((target, tokenizer), temperature=1.0), *chats)
    (ids,) = tokens
    scores = target.model(ids).logits[:, -17:-1]
    ranks = (scores > scores.gather(-1, ids[:, -16:, None])).sum(-1)
    # of the likeliest 50, which is what generate() samples from unless told otherwise, there are few
    assert (ranks >= 50).float().mean() > 0.5


def test_two_ranks_write_the_same_file_as_one(command, tmp_path, monkeypatch, capsys):
    one = command("one", *WARM)
    two = command("two", *WARM, "--rank", "1", "--ranks", "2")
    assert not (two / "train.jsonl").exists()
    assert "rank 1 of 2 is done" in capsys.readouterr().out
    monkeypatch.setenv("RANK", "0")  # as torchrun says it
    monkeypatch.setenv("WORLD_SIZE", "2")
    command("two", *WARM)
    assert texts(two) == texts(one)
    assert {path.name for path in (two / "journal").glob("*.lines")} == {"rank-00000.lines", "rank-00001.lines"}


def test_the_manifest_says_how_it_was_made_and_what_came_of_it(command):
    out = command("out", *WARM, "--top-k", "20")
    kept, found = manifest(out), rows(out)
    generation = kept["writer"]["generation"]
    assert (generation["do_sample"], generation["temperature"], generation["top_k"]) == (True, 1.5, 20)
    assert kept["writer"]["versions"]["torch"] and kept["writer"]["dtype"] == "float32"
    assert kept["conversations"] == len(found) == 26
    assert kept["response_tokens"] == sum(sum(row["response_tokens"]) for row in found)
    reasons = [reason for row in found for reason in row["finish_reasons"]]
    assert kept["finish_reasons"] == {reason: reasons.count(reason) for reason in dict.fromkeys(reasons)}
    cut = [
        n for row in found for n, r in zip(row["response_tokens"], row["finish_reasons"], strict=True) if r != "stop"
    ]
    assert set(cut) == {16}
    assert kept["seconds"] > 0 and kept["argv"][:3] == ["spd-lightning", "data", "regenerate"]


def test_the_output_loads_straight_back(command, model_folder, tmp_path):
    from spd_lightning.data.cleaning import Cleaner, check_sources
    from spd_lightning.data.store import Encoding, open_store

    out = command("out", *WARM)
    for source in (out / "train.jsonl", out):  # the folder too: neither journal nor manifest is taken for data
        encoding = Encoding(Cleaner(check_sources("SOURCE", str(source))), str(model_folder))
        store = open_store(encoding, tmp_path / "cache", "data.train")
        assert (len(store), store.tally.read, store.tally.kept) == (26, 26, 26)


def test_a_prompt_that_fills_the_context_ends_its_conversation(loaded):
    writer = writer_of(loaded, max_new_tokens=400)
    long = {"role": "user", "content": "value " * 400}
    answered = {"role": "assistant", "content": "old"}
    short = {"role": "user", "content": "a file"}
    first, second = written(writer, [short, answered, long, answered], [long, answered])
    assert first["row"]["messages"][0] == short and len(first["row"]["messages"]) == 2
    assert first["row"]["response_tokens"][0] <= 256
    assert first["ended"] == second["ended"] == "prompt fills the context of 256 tokens"
    assert second["row"] is None


def test_a_batch_too_large_for_the_gpu_is_written_in_halves(loaded, monkeypatch):
    import torch

    writer = writer_of(loaded)
    chats = [[{"role": "user", "content": text}, {"role": "assistant", "content": "old"}] for text in "abcdefg"]
    whole = written(writer, *chats)
    generate, sizes = writer.model.generate, []

    def small(ids: Any, **further: Any) -> Any:
        sizes.append(len(ids))
        if len(ids) > 2:
            raise torch.OutOfMemoryError
        return generate(ids, **further)

    monkeypatch.setattr(writer.model, "generate", small)
    assert written(writer, *chats) == whole
    assert sizes == [7, 3, 1, 2, 4, 2, 2]
    monkeypatch.setattr(writer.model, "generate", lambda *_, **__: (_ for _ in ()).throw(torch.OutOfMemoryError))
    with pytest.raises(InputError, match="--max-new-tokens 16 do not fit"):
        written(writer, *chats)


def writer_of(loaded: tuple[Any, Any], **sampling: Any) -> Any:
    from spd_lightning.data.chat import ChatOptions
    from spd_lightning.data.model_writer import ModelWriter

    return ModelWriter(*loaded, ChatOptions(), Sampling(**({"temperature": 0.0, "max_new_tokens": 16} | sampling)))


def written(writer: Any, *chats: list[dict[str, str]]) -> list[dict[str, Any]]:
    """The records of some conversations, as one unit."""
    dialogues = [Dialogue(n, Conversation(str(n), tuple(chat))) for n, chat in enumerate(chats)]
    done: list[Written] = []
    writer.write([Unit(0, dialogues)], done.append)
    return [dialogue.record() for dialogue in done[0].unit.dialogues]


@pytest.mark.parametrize("flag, value", [("--top-p", "0.9"), ("--top-k", "5")])
def test_choosing_among_greedy_tokens_is_refused(command, capsys, flag, value):
    command("out", flag, value, status=2)
    assert "give --temperature above 0 too" in error_line(capsys)


# -- thoughts --------------------------------------------------------------------------------------------------------

TAGS, CHANNELS = "{{ m.reasoning_content }}", "{{ '<|channel|>' }}{{ m.thinking }}"


@pytest.mark.parametrize(
    "template, prompt, text, content, thoughts",
    [
        (TAGS, "<|a|>", "<think>\nhm\n</think>\n\nyes", "yes", ("reasoning_content", "hm")),
        (TAGS, "<|a|><think>\n", "hm\n</think>\n\nyes", "yes", ("reasoning_content", "hm")),
        (TAGS, "<|a|><think>\n\n</think>\n\n", "yes", "yes", None),
        (TAGS, "<|a|>", "<think>\n\n</think>\n\nyes", "yes", None),
        (TAGS, "<|a|>", "<think>\nnever ends", "", ("reasoning_content", "never ends")),
        (TAGS, "<|a|>", "I say </think>", "I say </think>", None),
        ("{{ m.content }}", "<|a|>", "<think>\nhm\n</think>\n\nyes", "<think>\nhm\n</think>\n\nyes", None),
        (
            CHANNELS,
            "<|start|>assistant",
            "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>yes",
            "yes",
            ("thinking", "hm"),
        ),
        (CHANNELS, "<|start|>assistant", "<|channel|>analysis<|message|>never ends", "", ("thinking", "never ends")),
    ],
)
def test_thoughts_stand_where_the_template_looks_for_them(template, prompt, text, content, thoughts):
    assert Thoughts(template).split(text, prompt) == (content, thoughts)


def test_an_empty_answer_takes_back_what_led_to_it():
    call = {"role": "assistant", "content": "", "tool_calls": [{}]}
    user, tool, old = ({"role": role, "content": role} for role in ("user", "tool", "assistant"))
    dialogue = Dialogue(0, Conversation("x", (user, old, user, call, tool, old)))
    dialogue.answer(Answer("new", "stop", 1, 1))
    assert dialogue.messages[2:] == [user, call, tool]
    dialogue.answer(Answer("", "stop", 1, 1))
    assert not dialogue.is_open
    assert dialogue.messages == [user, {"role": "assistant", "content": "new"}]


# -- input -----------------------------------------------------------------------------------------------------------


def test_equal_ids_are_numbered_and_plain_texts_are_bad_rows(command, tmp_path, write_lines):
    turns = [{"role": "user", "content": "a file"}, {"role": "assistant", "content": "old"}]
    named: list[Any] = [{"id": name, "messages": turns} for name in ("a", "a", "a#2", "a", "b")]
    source = write_lines(tmp_path / "same.jsonl", [*named, {"text": "plain"}])
    out = command("out", "--max-bad-share", "0.5", source=source)
    assert [row["id"] for row in rows(out)] == ["a", "a#2", "a#2#2", "a#3", "b"]
    assert manifest(out)["tally"]["bad"] == {"a plain text, which has no responses": 1}


def test_too_many_bad_rows_end_before_anything_is_loaded(command, tmp_path, write_lines, capsys):
    source = write_lines(tmp_path / "plain.jsonl", [{"text": "plain"}] * 3)
    command("out", source=source, status=2)
    assert "--max-bad-share allows 5.0%" in error_line(capsys)
    assert not (tmp_path / "out" / "journal").exists()


# -- going on --------------------------------------------------------------------------------------------------------


def test_other_settings_and_other_input_are_refused_by_name(command, tmp_path, write_lines, capsys):
    out = command("out")
    before = texts(out)
    command("out", "--seed", "4", "--batch-size", "2", status=2)
    line = error_line(capsys)
    assert "sampling.seed was 0, now 4" in line and "batch_size was 4, now 2" in line and "--overwrite" in line
    turns = [{"role": "user", "content": "a file"}, {"role": "assistant", "content": "old"}]
    source = write_lines(tmp_path / "other.jsonl", [{"messages": turns}])
    command("out", source=source, status=2)
    assert "input was '26 conversations" in error_line(capsys)
    assert texts(out) == before
    command("out", "--overwrite", source=source)
    assert len(rows(out)) == 1


def test_a_file_of_other_origin_is_never_replaced(command, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "train.jsonl").write_text("mine\n")
    for further in ((), ("--overwrite",)):
        command("out", *further, status=2)
        assert "holds train.jsonl of other origin" in error_line(capsys)
    assert (tmp_path / "out" / "train.jsonl").read_text() == "mine\n"
    command("out", "--name", "answers")
    assert (tmp_path / "out" / "answers.jsonl").is_file()


def test_work_begun_by_three_ranks_can_be_ended_by_one(command):
    whole = command("whole", *WARM)
    part = command("part", *WARM, "--rank", "0", "--ranks", "3")
    assert texts(command("part", *WARM)) == texts(whole)
    lines = [line for path in (part / "journal").glob("*.lines") for line in path.read_bytes().splitlines()]
    assert sorted(json.loads(line)["unit"] for line in lines) == list(range(7))


@pytest.mark.parametrize("kills", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_kills_at_random_points_change_no_byte(command, make_conversations, write_lines, model_folder, tmp_path, kills):
    draw, units = random.Random(kills), 7 * kills
    given = make_conversations(2 * units, 4)
    source = write_lines(tmp_path / "many.jsonl", ({"messages": messages} for messages in given))
    arguments = ("--batch-size", "2", *WARM)
    whole, out = command("whole", *arguments, source=source), tmp_path / "out"
    journal = out / "journal" / "rank-00000.lines"
    script = "import sys; from spd_lightning.cli import main; sys.exit(main(sys.argv[1:]))"
    common = ["data", "regenerate", str(source), "--target", str(model_folder), "--max-new-tokens", "16"]
    for _ in range(kills):
        more = lines_in(journal) + draw.randint(0, 3)
        process = subprocess.Popen(
            [sys.executable, "-c", script, *common, *arguments, "--out", str(out)], stdout=subprocess.DEVNULL
        )
        limit = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < limit and lines_in(journal) <= more:
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.02))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "it ended before it was killed"
    assert texts(command("out", *arguments, source=source)) == texts(whole)
    numbers = [json.loads(line)["unit"] for line in journal.read_bytes().splitlines()]
    assert sorted(numbers) == list(range(units))


def lines_in(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_a_unit_is_in_the_journal_as_a_whole_or_not_at_all(command):
    out = command("out", *WARM)
    whole, journal = texts(out), out / "journal" / "rank-00000.lines"
    text = journal.read_bytes()
    journal.write_bytes(text[: -len(text) // 3])
    (out / "train.jsonl").unlink()
    command("out", *WARM)
    assert texts(out) == whole


# -- the command -----------------------------------------------------------------------------------------------------


def run_lines(arguments: Iterable[str]) -> tuple[int, str, str]:
    script = (
        "import sys; from spd_lightning.cli import main; status = main(sys.argv[1:]);"
        "print([n for n in ('torch', 'transformers', 'openai', 'numpy') if n in sys.modules]); sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def test_help_is_light_and_has_examples():
    status, out, _ = run_lines(["data", "regenerate", "--help"])
    assert status == 0
    assert "--base-url http://localhost:8000/v1" in out
    assert out.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ((), "give --target"),
        (("--target", "tiny", "--model", "m"), "--model m is for a server: give --base-url too"),
        (("--base-url", "http://x/v1", "--device", "cpu"), "--device cpu: a server has its own"),
        (("--base-url", "x:80"), "--base-url 'x:80': expected a URL"),
        (("--target", "tiny", "--batch-size", "0"), "--batch-size 0: expected at least 1"),
        (("--target", "tiny", "--max-new-tokens", "0"), "--max-new-tokens 0"),
        (("--target", "tiny", "--top-p", "2"), "--top-p 2.0"),
        (("--target", "tiny", "--temperature", "-1"), "--temperature -1.0"),
        (("--target", "tiny", "--rank", "1"), "--rank and --ranks belong together"),
        (("--target", "tiny", "--rank", "2", "--ranks", "2"), "expected 0 <= rank < ranks"),
        (("--target", "tiny", "--rank", "0", "--ranks", "2", "--overwrite"), "one rank would remove"),
        (("--target", "tiny", "--name", "a/b"), "--name 'a/b'"),
        (("--target", "tiny", "--max-failed-share", "2"), "--max-failed-share 2.0"),
        (("--target", "tiny", "--chat-arguments", "[1]"), "--chat-arguments '[1]'"),
        (("--target", "./nowhere"), "./nowhere"),
        (("--target", "tiny", "--dtype", "int3"), "--dtype='int3'"),
    ],
)
def test_wrong_input_is_one_line_and_leaves_no_folder(corpus, tmp_path, capsys, arguments, expected):
    out = tmp_path / "out"
    assert cli.main(["data", "regenerate", str(corpus), "--out", str(out), *arguments]) == 2
    assert expected in error_line(capsys)
    assert not out.exists()


def test_the_script_of_the_numbered_steps_is_the_command():
    script = Path(__file__).resolve().parents[2] / "data_prep" / "03_regenerate.py"
    done = subprocess.run([sys.executable, str(script), "--help"], capture_output=True, text=True, check=True)
    assert "usage: spd-lightning data regenerate" in done.stdout
