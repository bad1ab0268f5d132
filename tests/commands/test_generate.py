"""The command generate: what it prints, streams, colours and writes; with a random target and a tokenizer made here."""

from __future__ import annotations

import io
import json
import os
import random
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len

from spd_lightning import cli
from spd_lightning.commands import generate
from spd_lightning.commands.models import Models
from spd_lightning.commands.streaming import (
    ACCEPTED,
    IncrementalDetokenizer,
    TextStream,
    colour_console,
    column_after,
)
from spd_lightning.decoding.decoder import CycleEvent, SpdDecoder
from spd_lightning.decoding.generation import Generation

TEMPLATE = (
    "{% for m in messages %}<|user|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CORPUS = ["the list of the names of the list", "Zürich, 東京 und 🙂 sind schön", "return the value of the list\n"] * 5


def make_tokenizer():
    """A byte-level BPE with a chat template; every byte is a token, so characters are split."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|end|>", "<|user|>", "<|assistant|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=290,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", additional_special_tokens=special[1:]
    )
    fast.chat_template = TEMPLATE
    return fast


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def decode(tokenizer) -> Callable[..., str]:
    return lambda ids: tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)


@pytest.fixture(scope="module")
def models(tmp_path_factory, make_target, tokenizer) -> dict[str, Path]:
    """A random target with its tokenizer, and an untrained head for four stages, on disk."""
    from spd_lightning.head.folder import save_head
    from spd_lightning.head.loading import new_head

    folder = tmp_path_factory.mktemp("models")
    target = make_target(vocab=len(tokenizer), num_stages=4, eos_token_id=None)
    target.model.save_pretrained(folder / "target")
    tokenizer.save_pretrained(folder / "target")
    save_head(new_head(target), folder / "head")
    return {"target": folder / "target", "head": folder / "head"}


@pytest.fixture
def arguments(models) -> list[str]:
    return ["generate", "--target", str(models["target"]), "--head", str(models["head"]), "--max-new-tokens", "24"]


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def screen(written: str, width: int) -> list[str]:
    """What a terminal of `width` columns shows after `written`; knows wrapping, save/restore and erase-line."""
    rows: list[list[str]] = [[]]
    row = column = 0
    saved = (0, 0)
    for piece in re.findall(r"\x1b7|\x1b8|\x1b\[K|\x1b\[[\d;]*m|.|\n", written):
        if piece == "\x1b7":
            saved = (row, column)
        elif piece == "\x1b8":
            row, column = saved
        elif piece == "\x1b[K":
            del rows[row][column:]
        elif piece == "\n" or not piece.startswith("\x1b"):
            cells = cell_len(piece) if piece != "\n" else 0
            if piece == "\n" or column + cells > width:
                row, column = row + 1, 0
                rows += [[] for _ in range(row + 1 - len(rows))]
            if piece != "\n":
                rows[row] += [" "] * (column - len(rows[row]))
                rows[row][column : column + cells] = [piece] + [""] * (cells - 1)
                column += cells
    return ["".join(cells) for cells in rows]


def simulate(final: list[int], vocab: int, rate: float, seed: int, flight: int = 3) -> list[CycleEvent]:
    """Events of a decoder with a pipeline of `flight` drafts that emits `final`: accepted where the draft was right."""
    rng = random.Random(seed)
    events, drafts, done = [CycleEvent(None, None, final[0], None)], [], 1
    while done < len(final):
        ahead = done + len(drafts)
        right = ahead < len(final) and rng.random() < rate
        fresh = final[ahead] if right else rng.randrange(vocab)
        if len(drafts) < flight:
            drafts.append(fresh)
            events.append(CycleEvent(None, fresh, None, None))
            continue
        accepted = drafts[0] == final[done]
        events.append(CycleEvent(None, fresh, final[done], accepted))
        drafts = [*drafts[1:], fresh] if accepted else []
        done += 1
    return events


# -- incremental detokenisation --------------------------------------------------------------------------------------


def test_a_character_of_several_tokens_is_shown_once_it_is_complete(tokenizer, decode):
    ids = tokenizer("東京")["input_ids"]
    assert len(ids) > 2
    text = IncrementalDetokenizer(decode)
    pieces = [text.push(i) for i in ids]
    assert "".join(pieces) == "東京" and "" in pieces
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


@pytest.mark.parametrize("seed", range(5))
def test_pieces_add_up_to_the_whole_text_even_of_random_bytes(tokenizer, decode, seed):
    rng = random.Random(seed)
    words = [tokenizer(word)["input_ids"] for word in ("schön", " 🙂", "\n\n", " the", "東")]
    ids = [i for _ in range(60) for i in (rng.choice(words) if rng.random() < 0.6 else [rng.randrange(len(tokenizer))])]
    text = IncrementalDetokenizer(decode)
    shown = ""
    for count, token in enumerate(ids, start=1):
        shown += text.push(token)
        assert decode(ids[:count]).startswith(shown)
        assert shown + text.pending() == decode(ids[:count])
    assert shown + text.finish() == decode(ids) and text.finish() == ""


def test_looking_at_drafts_changes_nothing(tokenizer, decode):
    text = IncrementalDetokenizer(decode)
    ids = tokenizer("the list of schön")["input_ids"]
    shown = ""
    for token in ids:
        assert text.pending(tokenizer("🙂 names")["input_ids"]).endswith("🙂 names")
        shown += text.push(token)
    assert shown == "the list of schön"


def test_an_incomplete_character_at_the_end_is_not_lost(tokenizer, decode):
    ids = tokenizer("a🙂")["input_ids"][:-1]
    text = IncrementalDetokenizer(decode)
    assert "".join(text.push(i) for i in ids) == "a"
    assert text.finish() == decode(ids)[1:] != ""


# -- the stream ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [7, 20, 80])
@pytest.mark.parametrize("rate", [0.0, 0.7, 1.0])
def test_a_terminal_ends_up_with_exactly_the_final_text(monkeypatch, tokenizer, decode, width, rate):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    text = "the list of Zürich 東京 🙂 names\nreturn the value of 東京東京東京 the list of names"
    final = tokenizer(text)["input_ids"]
    output = Terminal()
    stream = TextStream(decode, output, width=width)
    for event in simulate(final, len(tokenizer), rate, seed=width):
        stream(event)
    stream.finish()
    assert stream.live and "\x1b[2m" in output.getvalue()  # drafts in flight were shown, dim
    assert screen(output.getvalue(), width) == screen(text + "\n", width)


def test_accepted_drafts_and_corrections_have_their_own_colours(monkeypatch, tokenizer, decode):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    a, b, c = (tokenizer(letter)["input_ids"][0] for letter in "abc")
    output = Terminal()
    stream = TextStream(decode, output, width=80)
    for event in (CycleEvent(None, None, a, None), CycleEvent(None, b, None, None), CycleEvent(None, a, b, True)):
        stream(event)
    stream(CycleEvent(None, a, c, False))
    stream.finish()
    written = re.sub(r"\x1b7.*?\x1b8|\x1b\[K", "", output.getvalue())  # without the drafts in flight
    assert written == "a\x1b[32mb\x1b[0m\x1b[1;33mc\x1b[0m\n"
    assert ACCEPTED == "green"


def test_a_model_cannot_send_control_sequences_to_a_terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    output = Terminal()
    stream = TextStream(lambda ids: "".join(map(chr, ids)), output, colour=True, width=80)
    for code in b"\x1b[2Jx\r\x9b":
        stream(CycleEvent(None, None, code, None))
    assert output.getvalue() == "␛[2Jx\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize(("variable", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_a_terminal_without_colours_gets_plain_text(monkeypatch, variable, value):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert colour_console(Terminal()) is not None
    monkeypatch.setenv(variable, value)
    assert colour_console(Terminal()) is None


def test_columns_count_wide_characters_tabs_and_wrapping():
    assert column_after("abc", 0, 10) == 3
    assert column_after("東京", 0, 10) == 4
    assert column_after("東", 9, 10) == 2  # does not fit into the last column
    assert column_after("a\tb", 0, 80) == 9
    assert column_after("a\nbc", 5, 10) == 2


# -- the command -----------------------------------------------------------------------------------------------------


def test_piped_output_is_the_text_alone_and_the_statistics_go_to_stderr(arguments, capsys, tmp_path):
    assert cli.main([*arguments, "--prompt", "the list", "--json", str(tmp_path / "out.json")]) == 0
    found = capsys.readouterr()
    content = json.loads((tmp_path / "out.json").read_text())
    assert "\x1b" not in found.out + found.err
    assert found.out == content["text"] + "\n"
    figures = content["generation"]
    line = found.err.splitlines()[-1]
    assert line.startswith(f"{len(figures['token_ids'])} tokens | acceptance p = {figures['acceptance']:.3f}")
    assert f"S = {figures['theoretical_speedup']:.2f} (n = 4)" in line
    assert f"{figures['cycles']} cycles" in line and "prefill" in line and "simulated clock" in line


@pytest.mark.parametrize("temperature", ["0", "0.8"])
def test_a_tree_gives_the_text_of_plain_decoding_and_says_what_it_took(arguments, capsys, temperature):
    words = ["--prompt", "the list", "--tree", "3", "--baseline", "--temperature", temperature]
    assert cli.main([*arguments, *words]) == 0
    found = capsys.readouterr()
    assert "acceptance p = " in found.err and "identical" in found.err


def test_the_json_file_holds_the_generation_and_every_cycle(arguments, models, tokenizer, tmp_path):
    from spd_lightning.head.loading import load_head
    from spd_lightning.target.loading import load_target

    path = tmp_path / "out.json"
    assert cli.main([*arguments, "--prompt", "the list", "--json", str(path), "--baseline"]) == 0
    content = json.loads(path.read_text())
    assert tokenizer.decode(content["prompt_ids"]) == "<|user|>the list<|end|><|assistant|>"
    target = load_target(models["target"])
    direct = SpdDecoder(target, load_head(models["head"], target)).generate(content["prompt_ids"], 24)
    assert content["generation"]["token_ids"] == direct.token_ids == content["baseline"]["token_ids"]
    emitted = [event["emitted"] for event in content["events"] if event["emitted"] is not None]
    assert emitted == direct.token_ids
    assert len(content["events"]) == 1 + direct.cycles
    assert list(tmp_path.iterdir()) == [path]


def test_raw_prompts_skip_the_chat_template(arguments, tokenizer, tmp_path):
    assert cli.main([*arguments, "--raw", "--prompt", "the list", "--json", str(tmp_path / "out.json")]) == 0
    assert json.loads((tmp_path / "out.json").read_text())["prompt_ids"] == tokenizer("the list")["input_ids"]


def test_without_a_head_the_baseline_runs(models, capsys):
    assert cli.main(["generate", "--target", str(models["target"]), "--prompt", "a", "--max-new-tokens", "5"]) == 0
    assert "autoregressive: 4 full passes" in capsys.readouterr().err


def test_without_a_prompt_every_line_of_stdin_is_one(arguments, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("the list\n\nthe names\n"))
    assert cli.main([*arguments, "--temperature", "1", "--seed", "3"]) == 0
    found = capsys.readouterr()
    assert len([line for line in found.err.splitlines() if "prefill" in line]) == 2
    assert "in all: 2 answers, " in found.err
    assert "> " not in found.out


@pytest.mark.parametrize("end", [EOFError, KeyboardInterrupt])
def test_an_interactive_session_ends_cleanly(arguments, capsys, monkeypatch, end):
    def stop(*_: object) -> str:
        raise end

    typed = Terminal("the list\n")
    monkeypatch.setattr(sys, "stdin", typed)
    if end is KeyboardInterrupt:
        monkeypatch.setattr(generate, "_typed_line", stop)
    assert cli.main(arguments) == 0
    found = capsys.readouterr().err
    assert "Ctrl-D ends" in found and "Traceback" not in found


@pytest.fixture
def encoded(monkeypatch) -> list[list[dict[str, str]]]:
    """The chats that were encoded, in order."""
    seen: list[list[dict[str, str]]] = []
    before = Models.encode

    def encode(self: Models, messages: Any) -> list[int]:
        seen.append([dict(message) for message in messages])
        return before(self, messages)

    monkeypatch.setattr(Models, "encode", encode)
    return seen


def said(messages: list[dict[str, str]]) -> list[str]:
    return [f"{message['role']}: {message['content']}" for message in messages if message["role"] != "assistant"]


def test_a_terminal_holds_one_conversation_until_it_is_reset(arguments, capsys, monkeypatch, encoded):
    monkeypatch.setattr(sys, "stdin", Terminal("the list\n/help\nthe names\n/reset\nthe value\n/quit\nnever\n"))
    assert cli.main([*arguments, "--system", "in short"]) == 0
    assert [said(messages) for messages in encoded] == [
        ["system: in short", "user: the list"],
        ["system: in short", "user: the list", "user: the names"],
        ["system: in short", "user: the value"],
    ]
    assert encoded[1][2]["role"] == "assistant" and encoded[1][2]["content"]
    assert "/reset begins another" in capsys.readouterr().err


@pytest.mark.parametrize(("turns", "remembers"), [("auto", False), ("single", False), ("multi", True)])
def test_lines_of_a_pipe_stand_for_themselves_unless_asked_otherwise(arguments, monkeypatch, encoded, turns, remembers):
    monkeypatch.setattr(sys, "stdin", io.StringIO("the list\nthe names\n"))
    assert cli.main([*arguments, "--turns", turns]) == 0
    assert (len(encoded[1]) == 3) == remembers


def test_a_prompt_that_is_too_long_does_not_end_the_session(arguments, capsys, monkeypatch, encoded):
    monkeypatch.setattr(sys, "stdin", Terminal(f"the list\n{'name ' * 3000}\nthe names\n"))
    assert cli.main(arguments) == 0
    found = capsys.readouterr().err
    assert "exceed the target's context" in found and "in all: 2 answers" in found
    assert said(encoded[2]) == ["user: the list", "user: the names"]


@pytest.mark.parametrize("session", [True, False])
def test_ctrl_c_ends_an_answer_and_keeps_what_there_is(arguments, capsys, monkeypatch, session):
    before = TextStream.__call__
    calls = []

    def interrupted(self: TextStream, event: Any) -> None:
        before(self, event)
        calls.append(event)
        if len(calls) == 20:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(TextStream, "__call__", interrupted)
    handler = signal.default_int_handler
    before_all = signal.signal(signal.SIGINT, handler)  # whoever started the tests in the background ignores it
    try:
        if session:
            monkeypatch.setattr(sys, "stdin", Terminal("the list\nthe names\n"))
            assert cli.main(arguments) == 0
        else:
            assert cli.main([*arguments, "--prompt", "the list"]) == 130
        assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, before_all)
    found = capsys.readouterr()
    assert "interrupted | " in found.err and "Traceback" not in found.err
    assert found.out.endswith("\n")
    assert ("in all: 2 answers" in found.err) == session


def test_ctrl_c_while_decoding_ends_the_line_and_the_program(arguments, capsys, monkeypatch):
    seen: list[CycleEvent] = []

    def interrupt(self: TextStream, event: CycleEvent) -> None:
        seen.append(event)
        if len(seen) == 9:
            raise KeyboardInterrupt

    monkeypatch.setattr(TextStream, "_track", interrupt)
    assert cli.main([*arguments, "--prompt", "the list"]) == 130
    found = capsys.readouterr()
    assert found.out.endswith("\n") and found.err.strip() == "interrupted"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (["--temprature", "1"], "Did you mean --temperature?"),
        (["--max-new-tokens", "few"], "--max-new-tokens: invalid int value"),
        (["--max-new-tokens", "0"], "--max-new-tokens 0: expected at least 1"),
        (["--temperature", "-1"], "temperature=-1.0"),
        (["--num-stages", "2"], "stages"),
        (["--device", "abacus"], "--device abacus"),
        (["--head", "./nothere"], "nothere"),
        (["--tree", "0"], "Tree.width=0 (--tree): expected 1 to 16"),
        (["--tree-sharpness", "2"], "--tree-sharpness 2 belongs to a tree: give --tree K too"),
        (["--tree", "2", "--workers", "4"], "--tree 2: a draft tree does not go together with --workers"),
        (["--json", "nothere/out.json"], "does not exist"),
    ],
)
def test_wrong_arguments_are_one_line(arguments, capsys, change, expected):
    assert cli.main([*arguments, "--prompt", "a", *change]) == 2
    found = capsys.readouterr()
    assert found.out == "" and len(found.err.splitlines()) == 1
    assert found.err.startswith("error: ") and expected in found.err


def test_contradictions_are_refused_before_anything_is_loaded(monkeypatch, capsys):
    monkeypatch.setattr(generate, "Session", lambda options: pytest.fail("loaded something"))
    for change in (["--num-stages", "4"], ["--baseline"]):
        assert cli.main(["generate", "--target", "tiny", "--prompt", "a", *change]) == 2
        assert "--head" in capsys.readouterr().err
    assert cli.main(["generate", "--target", "tiny", "--json", "x.json"]) == 2
    assert "--prompt" in capsys.readouterr().err


def test_the_comparison_says_where_outputs_differ():
    def made(ids: list[int]) -> Generation:
        return Generation(ids, 3, 1, len(ids) - 1, 0, 0)

    assert generate.comparison(made([1, 2]), made([1, 2]), True).endswith("identical output")
    assert "differs from new token 1 on" in generate.comparison(made([1, 2, 3]), made([1, 4, 3]), True)
    assert "differs from new token 2 on" in generate.comparison(made([1, 2]), made([1, 2, 3]), True)
    assert "the same law" in generate.comparison(made([1, 2]), made([1, 4]), False)
