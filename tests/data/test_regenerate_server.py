"""Responses by a server: a real one on this machine, which answers, stumbles, hangs and dies as the tests ask."""

from __future__ import annotations

import hashlib
import json
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from spd_lightning import cli


class Stub(ThreadingHTTPServer):
    """An OpenAI-compatible server whose answer is a function of the messages.

    Attributes:
        faults: text of a user's turn -> faults that requests with this last turn meet, one after the other.
        always: a fault that every other request meets.
        replies: text of a user's turn -> what the reply says instead.
        requests: bodies of all requests; times: when each came.
    """

    daemon_threads = True
    request_queue_size = 128  # the default of 5 loses connections that come together

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.faults: dict[str, list[Any]] = {}
        self.always: Any = None
        self.replies: dict[str, dict[str, Any]] = {}
        self.models = ["stub"]
        self.requests: list[dict[str, Any]] = []
        self.times: dict[str, list[float]] = defaultdict(list)
        self.delay = 0.0
        self.alive = True
        self.release = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, *_: object) -> None:
        """Clients that were killed leave broken pipes."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Stub

    def log_message(self, *_: object) -> None:
        pass

    def _send(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"content-type": "application/json", **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def do_GET(self) -> None:
        if not self.server.alive:
            return self._hang_up()
        assert self.path == "/v1/models"
        if self.server.always == 401:
            return self._send(401, b'{"error": {"message": "no such key"}}')
        models = [{"id": name, "object": "model", "created": 0, "owned_by": "x"} for name in self.server.models]
        self._send(200, json.dumps({"object": "list", "data": models}).encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        asked = body["messages"][-1]["content"]
        stub = self.server
        if not stub.alive:
            return self._hang_up()
        stub.requests.append(body)
        stub.times[asked].append(time.monotonic())
        waiting = stub.faults.get(asked, [])
        fault = waiting.pop(0) if waiting else stub.always
        time.sleep(stub.delay)
        if fault == "close":
            return self._hang_up()
        if fault == "hang":
            stub.release.wait(20)
            self.close_connection = True
            return None
        if fault == "broken JSON":
            return self._send(200, b'{"choices": [{"mess')
        if fault == "dies":
            stub.alive = False
            return self._hang_up()
        if isinstance(fault, int):
            headers = {"retry_after": "1"} if fault == 429 else {}
            return self._send(fault, json.dumps({"error": {"message": f"stub says {fault}"}}).encode(), **headers)
        self._send(200, json.dumps(completion(body["messages"], stub.replies.get(asked, {}))).encode())


def said(messages: list[dict[str, Any]]) -> str:
    return "answer " + hashlib.sha256(json.dumps(messages, sort_keys=True).encode()).hexdigest()[:12]


def completion(messages: list[dict[str, Any]], change: dict[str, Any]) -> dict[str, Any]:
    change = dict(change)
    reason = change.pop("finish_reason", "stop")
    message = {"role": "assistant", "content": said(messages), **change}
    usage = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
    choice = {"index": 0, "message": message, "finish_reason": reason}
    return {"id": "x", "object": "chat.completion", "created": 0, "model": "stub", "choices": [choice], "usage": usage}


@pytest.fixture
def stub() -> Iterator[Stub]:
    server = Stub()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield server
    server.release.set()
    server.shutdown()
    server.server_close()


def chat(*asked: str) -> dict[str, Any]:
    turns = [[{"role": "user", "content": text}, {"role": "assistant", "content": "old"}] for text in asked]
    return {"messages": [message for pair in turns for message in pair]}


@pytest.fixture
def corpus(tmp_path: Path, write_lines: Callable[..., Path]) -> Path:
    """Ten conversations; the third has two turns."""
    rows = [{"id": f"c{n}"} | chat(f"q{n}", *([f"then{n}"] if n == 2 else [])) for n in range(10)]
    return write_lines(tmp_path / "in.jsonl", rows)


@pytest.fixture
def command(stub: Stub, corpus: Path, tmp_path: Path) -> Callable[..., int]:
    def run(*further: str) -> int:
        out = str(tmp_path / "out")
        return cli.main(["data", "regenerate", str(corpus), "--base-url", stub.url, "--out", out, *further])

    return run


def rows(folder: Path) -> list[dict[str, Any]]:
    text = (folder / "train.jsonl").read_text(encoding="utf-8")
    assert text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "manifest.json").read_text(encoding="utf-8"))


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def test_each_turn_answers_the_new_ones_before_it_and_rows_keep_the_order_of_the_input(command, stub, tmp_path):
    assert command("--concurrency", "4") == 0
    found = rows(tmp_path / "out")
    assert [row["id"] for row in found] == [f"c{n}" for n in range(10)]
    first, answer, then, last = found[2]["messages"]
    assert answer["content"] == said([first])
    assert last["content"] == said([first, answer, then])
    assert (found[2]["finish_reasons"], found[2]["response_tokens"]) == (["stop", "stop"], [5, 5])
    kept = manifest(tmp_path / "out")
    assert (kept["conversations"], kept["response_tokens"], kept["prompt_tokens"]) == (10, 55, 110)
    assert kept["finish_reasons"] == {"stop": 11}
    assert kept["settings"]["model"] == "stub"


def test_requests_carry_sampling_a_seed_of_their_own_and_arguments_of_the_template(command, stub, tmp_path):
    arguments = ["--temperature", "0.5", "--top-p", "0.9", "--top-k", "7", "--max-new-tokens", "12", "--seed", "3"]
    assert command(*arguments, "--chat-arguments", '{"enable_thinking": false}') == 0
    body = stub.requests[0]
    assert (body["model"], body["temperature"], body["top_p"], body["top_k"]) == ("stub", 0.5, 0.9, 7)
    assert body["max_tokens"] == 12
    assert body["chat_template_kwargs"] == {"enable_thinking": False}
    assert len({body["seed"] for body in stub.requests}) == 11


def test_without_flags_the_choice_of_tokens_is_the_servers(command, stub):
    assert command() == 0
    assert not {"temperature", "top_p", "top_k", "chat_template_kwargs"} & set(stub.requests[0])


@pytest.mark.parametrize("fault", [429, 500, 503, "close", "hang"])
def test_a_passing_fault_is_met_by_asking_again(command, stub, tmp_path, fault):
    stub.faults = {"q4": [fault], "then2": [fault]}
    assert command("--timeout", "0.5") == 0
    assert len(rows(tmp_path / "out")) == 10
    kept = manifest(tmp_path / "out")
    assert (kept["failed"], kept["retries"]) == (0, 2)
    first, second = stub.times["q4"]
    if fault == 429:
        assert second - first >= 1, "Retry-After was not kept"


@pytest.mark.parametrize(
    "fault, reason",
    [
        (500, "InternalServerError"),
        (400, "stub says 400"),
        ("close", "APIConnectionError"),
        ("hang", "APITimeoutError"),
        ("broken JSON", "no chat completion"),
    ],
)
def test_a_lasting_fault_costs_one_conversation_until_the_command_is_run_again(
    command, stub, corpus, tmp_path, capsys, fault, reason
):
    stub.faults = {"q4": [fault, fault]}
    arguments = ["--timeout", "0.5", "--retries", "1" if fault in (500, "close", "hang") else "0"]
    assert command(*arguments, "--max-failed-share", "0.1") == 0
    assert [row["id"] for row in rows(tmp_path / "out")] == [f"c{n}" for n in range(10) if n != 4]
    kept = manifest(tmp_path / "out")
    assert (kept["failed"], kept["retries"]) == (1, int("1" in arguments))
    assert reason in next(iter(kept["failures"]))
    assert "run the same command again" in capsys.readouterr().out

    stub.faults, asked = {}, len(stub.requests)
    assert command(*arguments, "--max-failed-share", "0.1") == 0
    assert [row["id"] for row in rows(tmp_path / "out")] == [f"c{n}" for n in range(10)]
    assert len(stub.requests) == asked + 1, "only the failed conversation is asked for again"
    assert manifest(tmp_path / "out")["failed"] == 0


def test_more_failures_than_tolerated_end_with_one_line_and_no_file(command, stub, tmp_path, capsys):
    stub.faults = {"q1": [400], "q7": [400]}
    assert command() == 2
    line = error_line(capsys)
    assert "2 of 10 conversations failed (20.0%, --max-failed-share allows 5.0%)" in line
    assert "stub says 400" in line
    assert not (tmp_path / "out" / "train.jsonl").exists()
    assert command() == 0
    assert len(rows(tmp_path / "out")) == 10


def test_a_run_in_which_everything_fails_ends_long_before_its_end(stub, tmp_path, write_lines, capsys):
    source = write_lines(tmp_path / "many.jsonl", (chat(f"question {n}") for n in range(2000)))
    stub.always = 400
    assert cli.main(["data", "regenerate", str(source), "--base-url", stub.url, "--out", str(tmp_path / "o")]) == 2
    assert "--max-failed-share" in error_line(capsys)
    assert len(stub.requests) < 300


@pytest.mark.parametrize("status, hint", [(401, "--api-key-env"), (404, "--model")])
def test_a_server_that_refuses_ends_the_run_at_once(command, stub, tmp_path, capsys, status, hint):
    stub.always = status
    began = time.monotonic()
    assert command("--model", "stub", "--concurrency", "2") == 2
    assert time.monotonic() - began < 5
    line = error_line(capsys)
    assert str(status) in line and hint in line and stub.url in line
    assert len(stub.requests) <= 2


def test_a_server_that_is_not_there_is_one_line_at_once(corpus, tmp_path, capsys):
    arguments = ["--base-url", "http://127.0.0.1:9/v1", "--out", str(tmp_path / "out")]
    began = time.monotonic()
    assert cli.main(["data", "regenerate", str(corpus), *arguments]) == 2
    assert time.monotonic() - began < 10
    assert "--base-url http://127.0.0.1:9/v1 does not answer" in error_line(capsys)


def test_a_server_that_dies_ends_the_run_and_what_was_written_is_kept(command, stub, tmp_path, capsys):
    stub.faults = {"q6": ["dies"]}
    assert command("--retries", "1", "--concurrency", "1") == 2
    assert "does not answer" in error_line(capsys)
    stub.alive, stub.requests = True, []
    assert command("--retries", "1", "--concurrency", "1") == 0
    assert len(rows(tmp_path / "out")) == 10
    asked = [body["messages"][0]["content"] for body in stub.requests]
    assert asked == ["q6", "q7", "q8", "q9"]


def test_several_models_need_a_name_and_an_unknown_name_is_refused(command, stub, capsys):
    stub.models = ["one", "two"]
    assert command() == 2
    assert "serves one, two: say which one with --model" in error_line(capsys)
    assert command("--model", "three") == 2
    assert "--model 'three'" in error_line(capsys)


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
def test_thoughts_are_kept_beside_the_answer(command, stub, tmp_path, field):
    stub.replies = {"q3": {field: "\nhm\n"}}
    assert command() == 0
    answer = rows(tmp_path / "out")[3]["messages"][-1]
    assert answer["reasoning_content"] == "hm"
    assert answer["content"].startswith("answer ")


def test_cut_responses_are_flagged_and_can_be_left_out(command, stub, tmp_path):
    stub.replies = {"q3": {"finish_reason": "length"}}
    assert command() == 0
    assert rows(tmp_path / "out")[3]["finish_reasons"] == ["length"]
    asked = len(stub.requests)
    assert command("--drop-unfinished") == 0
    assert [row["id"] for row in rows(tmp_path / "out")] == [f"c{n}" for n in range(10) if n != 3]
    assert manifest(tmp_path / "out")["dropped"] == {"unfinished response": 1}
    assert len(stub.requests) == asked, "the final file is made from what was written"


def test_an_empty_response_ends_a_conversation_with_the_turns_before(command, stub, tmp_path):
    stub.replies = {"q3": {"content": None}, "then2": {"content": " \n"}, "q5": {"content": "", "reasoning": "so"}}
    assert command() == 0
    found = {row["id"]: row for row in rows(tmp_path / "out")}
    assert len(found) == 8
    assert [m["role"] for m in found["c2"]["messages"]] == ["user", "assistant"]
    kept = manifest(tmp_path / "out")
    assert kept["shortened"] == {"empty response": 1}
    assert kept["dropped"] == {"empty response": 1, "thoughts without an answer": 1}


def test_nothing_but_empty_responses_is_an_error_without_a_file(command, stub, tmp_path, capsys):
    stub.replies = {f"q{n}": {"content": ""} for n in range(10)}
    assert command() == 2
    assert "no conversation was written: {'empty response': 10}" in error_line(capsys)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["journal"]


def test_an_interrupted_run_ends_without_a_traceback_and_goes_on(command, stub, corpus, tmp_path):
    stub.delay = 0.3
    # a job that a shell puts in the background inherits that SIGINT is ignored
    script = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from spd_lightning.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    arguments = ["data", "regenerate", str(corpus), "--base-url", stub.url, "--concurrency", "1", "--out"]
    process = subprocess.Popen(
        [sys.executable, "-c", script, *arguments, str(tmp_path / "out")], stderr=subprocess.PIPE, text=True
    )
    while len(stub.requests) < 3 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=20)
    assert (process.returncode, told.splitlines()[-1]) == (130, "interrupted")
    assert "Traceback" not in told
    stub.delay = 0.0
    assert command() == 0
    assert len(rows(tmp_path / "out")) == 10
    assert len(stub.requests) <= 12


def test_tool_calls_stay_and_the_answers_around_them_are_new(stub, tmp_path, write_lines):
    call = [{"type": "function", "function": {"name": "look", "arguments": {"at": "it"}}}]
    messages = [
        {"role": "user", "content": "find it"},
        {"role": "assistant", "content": "", "tool_calls": call},
        {"role": "tool", "content": "here"},
        {"role": "assistant", "content": "old"},
    ]
    tools = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
    source = write_lines(tmp_path / "in.jsonl", [{"messages": messages, "tools": tools}])
    arguments = ["--tools", "keep", "--base-url", stub.url, "--out", str(tmp_path / "out")]
    assert cli.main(["data", "regenerate", str(source), *arguments]) == 0
    (row,) = rows(tmp_path / "out")
    assert row["messages"][:3] == messages[:3]
    assert row["messages"][3]["content"] == said(messages[:3])
    assert stub.requests[0]["tools"] == tools == row["tools"]


def test_a_finished_folder_says_so_without_the_server(command, stub, tmp_path, capsys):
    assert command() == 0
    before = (tmp_path / "out" / "train.jsonl").read_bytes()
    stub.alive, stub.requests = False, []
    capsys.readouterr()
    assert command() == 0
    assert "is finished" in capsys.readouterr().out
    assert not stub.requests
    assert (tmp_path / "out" / "train.jsonl").read_bytes() == before


def test_the_way_through_a_server_imports_no_torch(stub, corpus, tmp_path):
    script = (
        "import sys; from spd_lightning.cli import main; status = main(sys.argv[1:]);"
        "print([name for name in ('torch', 'transformers', 'datasets') if name in sys.modules]); sys.exit(status)"
    )
    arguments = ["data", "regenerate", str(corpus), "--base-url", stub.url, "--out", str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_missing_package_is_one_line(command, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "openai", None)
    assert command() == 2
    assert "pip install 'spd_lightning[server]'" in error_line(capsys)


# -- kills -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_kills_at_random_points_lose_nothing_and_repeat_nothing(stub, tmp_path, write_lines):
    draw, kills = random.Random(5), 20
    given = [{"id": f"c{n}"} | chat(f"q{n}", *([f"then{n}"] if n % 3 == 0 else [])) for n in range(160)]
    source = write_lines(tmp_path / "in.jsonl", given)
    common = ["data", "regenerate", str(source), "--base-url", stub.url, "--concurrency", "4", "--out"]
    assert cli.main([*common, str(tmp_path / "whole")]) == 0
    stub.requests, stub.delay = [], 0.005

    out = tmp_path / "out"
    journal = out / "journal" / "rank-00000.lines"
    script = "import sys; from spd_lightning.cli import main; sys.exit(main(sys.argv[1:]))"
    ended_by = []
    for kill in range(kills):
        process = subprocess.Popen([sys.executable, "-c", script, *common, str(out)], stdout=subprocess.DEVNULL)
        size = len(journal.read_bytes().splitlines()) if journal.exists() else 0
        # some kills come before anything is written, most after a few more lines
        limit = time.monotonic() + 20 if kill % 5 else time.monotonic() + draw.uniform(0, 0.5)
        more = size + draw.randint(1, 7)
        while process.poll() is None and time.monotonic() < limit:
            if journal.exists() and journal.read_bytes().count(b"\n") >= more:
                break
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.01))
        process.send_signal(signal.SIGKILL)
        ended_by.append(process.wait())
        assert not (out / "train.jsonl").exists() or process.returncode == 0
    assert Counter(ended_by)[-signal.SIGKILL] == kills

    assert cli.main([*common, str(out)]) == 0
    assert (out / "train.jsonl").read_bytes() == (tmp_path / "whole" / "train.jsonl").read_bytes()
    units = [json.loads(line)["unit"] for line in journal.read_bytes().splitlines()]
    assert sorted(units) == list(range(160)), "each conversation is in the journal once"
    repeated = len(stub.requests) - sum(len(row["messages"]) // 2 for row in given)
    assert repeated <= kills * 4 * 2, "at most what was on its way is asked for again"


def test_a_journal_torn_anywhere_in_its_last_line_is_continued(command, corpus, tmp_path):
    assert command("--concurrency", "1") == 0
    out = tmp_path / "out"
    whole, journal = (out / "train.jsonl").read_bytes(), out / "journal" / "rank-00000.lines"
    text = journal.read_bytes()
    start = text[:-1].rindex(b"\n") + 1
    for cut in (start, start + 1, start + 30, len(text) - 2, len(text) - 1):
        journal.write_bytes(text[:cut])
        (out / "train.jsonl").unlink()
        assert command("--concurrency", "1") == 0
        assert (out / "train.jsonl").read_bytes() == whole
        lines = journal.read_bytes().splitlines()
        assert sorted(json.loads(line)["unit"] for line in lines) == list(range(10))


def test_a_damaged_line_in_the_middle_is_named(command, corpus, tmp_path, capsys):
    assert command() == 0
    journal = tmp_path / "out" / "journal" / "rank-00000.lines"
    lines = journal.read_bytes().splitlines(keepends=True)
    lines[3] = b"\x00" * len(lines[3])
    journal.write_bytes(b"".join(lines))
    (tmp_path / "out" / "train.jsonl").unlink()
    assert command() == 2
    assert re.search(r"rank-00000.lines: line 4 is damaged", error_line(capsys))


def test_two_processes_do_not_write_one_journal(command, tmp_path, capsys):
    from spd_lightning.data.journal import Workplace

    place = Workplace(tmp_path / "out", "train")
    with place.lock():
        pass
    held = place.open_journal(0)
    assert command() == 2
    assert "another process writes" in error_line(capsys)
    assert command("--overwrite") == 2
    assert "another process writes" in error_line(capsys)
    held.close()
    assert command("--overwrite") == 0


def test_what_a_kill_left_of_the_final_file_is_written_over(command, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".train.jsonl.part").write_text("x" * 100_000)
    assert command() == 0
    assert len(rows(tmp_path / "out")) == 10
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"journal", "train.jsonl", "manifest.json"}
