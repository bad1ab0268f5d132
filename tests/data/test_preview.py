"""Previews: pieces that read as the sample does, figures of a scan, and a page that no content can break."""

from __future__ import annotations

import json
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from spd_lightning.commands.data.preview import plain, styled
from spd_lightning.data.chat import ChatEncoder, ChatOptions, Sample
from spd_lightning.data.cleaning import Cleaner, check_sources
from spd_lightning.data.conversations import Conversation
from spd_lightning.data.preview import Piece, Scan, Shown, html_page, pieces, scan, visible
from spd_lightning.data.reading import read
from spd_lightning.data.store import Encoding

HOSTILE = [
    "<script>alert(1)</script>",
    "</div></html>",
    "&amp;&lt;",
    "\"'><img src=x onerror=alert(1)>",
    "{summary}{{ 7 * 7 }}",
    "\x1b[31mred\x00\x07",
    "\u202eright to left\u2066\ufeff",
    "\r\n\n\t",
    "\U0001f469\u200d\U0001f4bb\U0001f3f4\u65e5\u672c\u8a9ee\u0301",
    "\ufffd\ufffd",
    "<|end|>",
    "\u2039\u00a6\u203a",
]
texts = st.lists(st.sampled_from(HOSTILE) | st.text(max_size=8), min_size=1, max_size=4).map("".join)
answers = texts.filter(lambda text: bool(text.strip()))
#: Writes an older answer in another way than the last one, as templates do that leave out its thoughts.
FORGETFUL = (
    "{% for m in messages %}<|{{ m['role'] }}|>"
    "{% if m['role'] == 'assistant' and not loop.last %}(old){% endif %}{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def spaced_tokenizer(template: str) -> Any:
    """The other kind: spaces as signs, unknown characters as bytes, a decoder that strips the first space."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<|pad|>", "<|user|>", "<|assistant|>", "<|end|>", "<|system|>"]
    entries = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", *"abcdefghijklmnopqrstuvwxyz"]
    inner = Tokenizer(models.BPE({entry: i for i, entry in enumerate(entries)}, [], byte_fallback=True))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    inner.decoder = decoders.Sequence(steps)
    inner.add_special_tokens([AddedToken(token, special=True) for token in special])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|end|>", pad_token="<|pad|>")
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module", params=["bytes", "spaces"])
def encoder(request: pytest.FixtureRequest, make_tokenizer: Callable[..., Any]) -> ChatEncoder:
    bytes_ = make_tokenizer()
    return ChatEncoder(bytes_ if request.param == "bytes" else spaced_tokenizer(bytes_.chat_template), 512)


def encoded(encoder: ChatEncoder, question: str, answer: str) -> Sample:
    turns = [("user", question), ("assistant", answer)] * 2
    return encoder([{"role": role, "content": content} for role, content in turns])[0]


def decoded(encoder: ChatEncoder, ids: Any) -> str:
    found = encoder.tokenizer.decode(ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return str(found)


class Page(HTMLParser):
    """What a browser would make of the page: the content of the samples, the tags, every span's title and class."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.samples: list[str] = []
        self.spans: list[tuple[str, str, str]] = []  # class, title, text
        self.inside = False
        self.feed(page)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attributes}
        assert not any(name.startswith("on") or name in ("src", "href") for name in given), given
        self.tags.add(tag)
        if tag not in ("meta", "!doctype"):
            self.open.append(tag)
        if tag == "div":
            self.inside = True
            self.samples.append("")
        elif tag == "span" and self.inside:
            self.spans.append((given["class"], given["title"], ""))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        self.inside = self.inside and tag != "div"

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.samples[-1] += data
            kind, title, text = self.spans[-1]
            self.spans[-1] = (kind, title, text + data)


TAGS = {"html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "pre", "div", "span", "i"}
relaxed = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


@relaxed
@given(question=answers, answer=answers)
@example(question="\ufffd", answer="\U0001f469\u200d\U0001f4bb")
@example(question=" two  words ", answer=" a b")
def test_pieces_read_as_the_sample_does_and_labelled_ones_as_its_labels(
    encoder: ChatEncoder, question: str, answer: str
):
    sample = encoded(encoder, question, answer)
    found = pieces(sample, encoder)
    assert "".join(piece.text for piece in found) == decoded(encoder, sample.ids)
    assert [token for piece in found for token in piece.ids] == sample.ids.tolist()
    labelled = [position for piece in found if piece.kind != "prompt" for position in _positions(piece)]
    assert labelled == sample.labelled.nonzero()[0].tolist()
    text = "".join(piece.text for piece in found if piece.kind != "prompt")
    # the content is followed by the end of the turn; a tokenizer may add nothing and lose nothing
    assert text == f"{answer}<|end|>" * 2


def _positions(piece: Piece) -> range:
    return range(piece.start, piece.start + len(piece.ids))


def test_characters_of_several_tokens_are_one_piece_and_others_one_each(make_tokenizer: Callable[..., Any]):
    encoder = ChatEncoder(make_tokenizer(), 512)
    found = pieces(encoded(encoder, "q", "x\U0001f642\u65e5y"), encoder)
    first = [piece for piece in found if piece.kind != "prompt"][:5]
    assert [piece.text for piece in first] == ["x", "\U0001f642", "\u65e5", "y", "<|end|>"]
    assert [len(piece.ids) for piece in first] == [1, 4, 3, 1, 1]
    assert [piece.kind for piece in first] == ["first", *["label"] * 4]
    assert [piece.special for piece in first] == [False] * 4 + [True]


def test_a_text_cut_inside_a_character_is_shown_all_the_same(make_tokenizer: Callable[..., Any]):
    encoder = ChatEncoder(make_tokenizer(), 6)
    samples = encoder.encode([Conversation("", text="\U0001f642\U0001f642\U0001f642 ok")])[0]
    assert isinstance(samples, list) and len(samples) > 1
    for sample in samples:
        assert "".join(piece.text for piece in pieces(sample, encoder)) == decoded(encoder, sample.ids)


def test_half_a_character_ends_at_a_special_token_and_at_the_border_of_a_turn(make_tokenizer: Callable[..., Any]):
    encoder = ChatEncoder(make_tokenizer(), 512)
    *smile, end = encoder.tokenizer("\U0001f642<|end|>")["input_ids"]
    half, rest = smile[:2], smile[2:]
    ids = np.array([*half, end, *half, *rest, end], np.int32)
    found = pieces(Sample(0, ids, ((5, 8),)), encoder)
    assert [(piece.text, piece.kind, piece.special) for piece in found] == [
        ("\ufffd", "prompt", False),
        ("<|end|>", "prompt", True),
        ("\ufffd", "prompt", False),
        ("\ufffd\ufffd", "first", False),
        ("<|end|>", "label", True),
    ]


@relaxed
@given(question=answers, answer=answers)
def test_a_page_holds_the_text_of_its_samples_and_nothing_that_runs(encoder: ChatEncoder, question: str, answer: str):
    sample = encoded(encoder, question, answer)
    page = Page(html_page([Shown(f"{question}:1", 1, 1, sample)], encoder, [answer]))
    assert page.samples == [visible(decoded(encoder, sample.ids))]
    assert page.tags <= TAGS
    found = pieces(sample, encoder)
    assert [text for _, _, text in page.spans] == [visible(piece.text) for piece in found]
    for (kind, title, _), piece in zip(page.spans, found, strict=True):
        assert kind == piece.kind[0] + " s" * piece.special
        entries = encoder.tokenizer.convert_ids_to_tokens(list(piece.ids))
        numbered = enumerate(zip(piece.ids, entries, strict=True), piece.start)
        lines = [f"position {position}, id {token}: {entry}" for position, (token, entry) in numbered]
        assert title == visible("\n".join(lines))


def test_a_page_needs_no_network_and_knows_light_and_dark(encoder: ChatEncoder):
    page = html_page([Shown("x", 1, 1, encoded(encoder, "q", "a"))], encoder, ["summary"])
    assert "http" not in page and "@import" not in page and "url(" not in page and "<script" not in page
    assert "prefers-color-scheme: dark" in page and 'class="key"' in page and 'charset="utf-8"' in page


@given(st.text())
def test_nothing_that_steers_a_terminal_stays(text: str):
    shown = visible(text)
    assert not any(ord(c) < 32 and c not in "\n\t" or 127 <= ord(c) < 160 for c in shown)
    assert not set(shown) & set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u200e\u200f\ufeff")


def test_plain_text_puts_labels_between_signs():
    made = [
        Piece(0, (1,), "<|user|>", "prompt", True),
        Piece(1, (5,), "q\n", "prompt", False),
        Piece(2, (6,), "A", "first", False),
        Piece(3, (7,), "n\n", "label", False),
        Piece(4, (8,), "b", "label", False),
        Piece(5, (9,), "u", "prompt", False),
        Piece(6, (9,), "C", "first", False),
        Piece(7, (9,), "D", "first", False),
    ]
    assert plain(made) == "<|user|>q\u23ce\n\u2039A\u00a6n\u23ce\nb\u203au\u2039C\u203a\u2039D\u203a"
    assert "".join(text for text, _ in styled(made)) == "<|user|>q\u23ce\nAn\u23ce\nbuCD"
    assert ("\n", "none") in list(styled(made))


# -- scan ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def scanned(tmp_path: Path, model_folder: Path) -> Callable[..., Scan]:
    """Scans rows; arguments of Encoding."""

    def run(rows: list[Any], samples: int = 100, **options: Any) -> Scan:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        cleaner = Cleaner(check_sources("SOURCE", [str(path)]))
        return scan(Encoding(cleaner, str(model_folder), **options), read(cleaner.sources), samples)

    return run


def chat(*contents: str) -> dict[str, Any]:
    roles = ("user", "assistant") * len(contents)
    return {"messages": [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]}


def test_a_scan_counts_what_training_would_see(scanned: Callable[..., Scan], make_conversations: Callable[..., Any]):
    rows = [{"messages": messages} for messages in make_conversations(150, 3)]
    found = scanned([*rows, "no json", {"a": 1}], samples=4)
    assert (found.tally.read, found.tally.kept, sum(found.tally.bad.values())) == (152, 150, 2)
    assert len(found.shown) == 4 and len(found.lengths) == 150 and found.per_chat == {1: 150}
    everything = scanned(rows, samples=1000).shown
    assert found.lengths == [len(shown.sample) for shown in everything]
    assert found.labels == sum(shown.sample.labels for shown in everything)
    assert found.first == sum(len(shown.sample.turns) for shown in everything)
    assert found.cut == found.lost == 0
    lines = "\n".join(found.lines(2048))
    assert "invalid JSON" in lines and "unknown fields" in lines and "several samples" not in lines


def test_conversations_that_lose_labels_to_the_length_are_counted_with_the_loss(scanned: Callable[..., Scan]):
    rows = [chat("a", "the file opens the path " * k) for k in (1, 2, 3)]
    whole = scanned(rows)
    length = whole.lengths[1]  # the second one just fits
    found = scanned(rows, max_length=length)
    assert found.cut == 1 and found.lost == whole.labels - found.labels > 0
    assert found.lengths[1:] == [length, length]
    assert f"cut by --max-length {length}: 1 conversations" in "\n".join(found.lines(length))


def test_answers_that_a_template_rewrites_make_samples_of_their_own_and_the_preview_says_why(
    scanned: Callable[..., Scan], tmp_path: Path
):
    template = tmp_path / "template.jinja"
    template.write_text(FORGETFUL)
    options = ChatOptions(template=str(template))
    found = scanned([chat("q", "a", "q", "b", "q", "c"), chat("q", "a")], chat=options)
    assert found.per_chat == {3: 1, 1: 1}
    assert [(s.number, s.count) for s in found.shown] == [(1, 3), (2, 3), (3, 3), (1, 1)]
    assert any(line.startswith("several samples: 1 of 2 conversations, 2.00") for line in found.lines(512))
    # a later sample that is left out because its answer begins behind the limit is a loss as well
    short = scanned([chat("q", "a", "q" * 60, "b")], chat=options, max_length=20)
    assert max(short.lengths) < 20 and short.cut == 1 and short.lost == 2


def test_long_plain_texts_go_on_and_lose_nothing(scanned: Callable[..., Scan]):
    found = scanned([{"text": "the file opens the path " * 9}], max_length=10)
    assert found.cut == 0 and max(found.per_text) > 1 and not found.per_chat
    assert any("plain texts" in line for line in found.lines(10))
