"""The step vocab: count a draft vocabulary, and say what it costs and saves."""

from __future__ import annotations

import sys
from argparse import Namespace
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spd_lightning.commands.data import common
from spd_lightning.commands.parsing import CommandParser
from spd_lightning.errors import InputError

if TYPE_CHECKING:
    from spd_lightning.data.cleaning import Part
    from spd_lightning.data.sources import Source
    from spd_lightning.data.store import TokenStore
    from spd_lightning.data.vocabulary import DraftVocabulary, Timing
    from spd_lightning.target.loading import Loading

_ABOUT = """\
Choose the ids that a head can propose: count the tokens it is trained to draft (what the assistant wrote, without the
first token of each turn), take the most frequent ones, and report how many held-out labels they miss. Special tokens
are always in. Count on responses that the target wrote (data regenerate): they are what it will be asked to draft."""

_EXAMPLES = f"""\
{common.SOURCES}
  Weights are not used: every row counts once.

examples
  spd-lightning data vocab documentation:train --heldout documentation:heldout --target tiny --size 1024 --out v.json
  spd-lightning data vocab chats.jsonl --tokenizer Qwen/Qwen3-8B --coverage 0.99 --out build/vocab.json
  spd-lightning fit --config tiny --model.head.draft_vocabulary v.json"""

#: Acceptance with the whole vocabulary, for which the table shows the speedup.
ACCEPTANCES = (0.80, 0.85)


def parser() -> CommandParser:
    """The arguments of data vocab."""
    made = CommandParser("spd-lightning data vocab", _ABOUT, _EXAMPLES)
    common.add_sources(made)
    choice = made.add_argument_group("choice")
    choice.add_argument("--size", type=int, metavar="N", help="this many ids")
    choice.add_argument(
        "--coverage", type=float, metavar="X", help="as few ids as cover the share X of the training labels: 0.99"
    )
    choice.add_argument(
        "--target", help="folder or hub id: its vocabulary, its end of sequence, the time of its lm_head"
    )
    choice.add_argument("--num-stages", type=int, default=8, metavar="N", help="stages n that S is shown for (8)")
    choice.add_argument("--out", required=True, type=Path, metavar="FILE", help="the JSON file to write")
    split = made.add_argument_group("held-out labels")
    split.add_argument("--heldout", nargs="+", metavar="SOURCE", help="sources of their own")
    split.add_argument("--heldout-share", type=float, metavar="X", help="or this share of the conversations (0.05)")
    common.add_chat(made)
    made.set_defaults(tokenizer=None)  # the target's, where there is one
    common.add_cleaning(made)
    tokens = made.add_argument_group("tokens")
    tokens.add_argument("--max-length", type=int, default=2048, metavar="N", help="tokens of a sample (2048)")
    tokens.add_argument("--cache", type=Path, metavar="DIR", help="for tokenised corpora (SPD_CACHE, or the user's)")
    tokens.add_argument("--workers", type=int, default=0, metavar="N", help="further processes that tokenise (0)")
    return made


def run(argv: list[str]) -> int:
    """`spd-lightning data vocab`."""
    options = parser().parse_args(argv)
    _check(options)
    from spd_lightning.data.vocabulary import (
        DraftVocabulary,
        check_size,
        label_counts,
        ranking,
        size_for_coverage,
        write_vocabulary,
    )

    ids = _Ids(options)
    if options.size is not None:
        check_size(options.size, ids.always, ids.count)
    stores = _stores(options)
    train, heldout = (label_counts(store, ids.count) for store in stores)
    order = ranking(train, ids.always)
    size = options.size or max(len(ids.always), size_for_coverage(train, order, options.coverage))
    vocabulary = DraftVocabulary(order, size, train, heldout)
    write_vocabulary(options.out, vocabulary, _provenance(options, argv, stores, vocabulary))
    _report(options, ids, vocabulary)
    return 0


def _check(options: Namespace) -> None:
    """Refuse what contradicts itself, before anything is imported or loaded."""
    if (options.size is None) == (options.coverage is None):
        raise InputError("--size N or --coverage X: expected exactly one of the two.")
    if options.coverage is not None and not 0 < options.coverage <= 1:
        raise InputError(f"--coverage {options.coverage}: expected a share above 0 and at most 1, such as 0.99.")
    if options.heldout is not None and options.heldout_share is not None:
        raise InputError("--heldout and --heldout-share: expected at most one of the two.")
    if options.heldout_share is not None and not 0 < options.heldout_share < 1:
        raise InputError(f"--heldout-share {options.heldout_share}: expected a number between 0 and 1.")
    for name, least in (("size", 1), ("num_stages", 1), ("max_length", 2), ("workers", 0)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise InputError(f"--{name.replace('_', '-')} {value}: expected at least {least}.")
    if not options.out.parent.is_dir():
        raise InputError(f"--out {options.out}: the folder {options.out.parent} does not exist.")
    if options.out.is_dir():
        raise InputError(f"--out {options.out} is a folder: expected the name of a JSON file.")
    if options.heldout is None and options.heldout_share is None:
        options.heldout_share = 0.05
    options.tokenizer = options.tokenizer or options.target or "tiny"


class _Ids:
    """What tokenizer and target say of the vocabulary: its size, the ids always in it, H where there is a target."""

    def __init__(self, options: Namespace) -> None:
        from spd_lightning.data.chat import ChatEncoder
        from spd_lightning.target.loading import check_target, load_tokenizer

        loading = common.loading(options)
        tokenizer = load_tokenizer(options.tokenizer, loading)
        special = set(ChatEncoder(tokenizer, options.max_length, common.chat(options)).special)
        self.count, self.hidden_size = len(tokenizer), None
        if options.target is not None:
            if options.target != options.tokenizer:
                loading = common.loading(Namespace(**vars(options) | {"revision": None}))  # that of the tokenizer
            config: Any = check_target(options.target, loading, named=lambda name: "--" + name.replace("_", "-"))
            text = config.get_text_config()
            self.count, self.hidden_size = int(text.vocab_size), int(text.hidden_size)
            special |= _ends(options.target, loading, config, text)
        self.always = sorted(token for token in special if 0 <= token < self.count)


def _ends(target: str, loading: Loading, *configs: Any) -> set[int]:
    """The ids that end a generation, by generation_config.json and config.json."""
    from transformers import GenerationConfig

    from spd_lightning.target.loading import embedded_target_path

    source = embedded_target_path() if target == "tiny" else target
    with suppress(OSError, ValueError):  # not every target has one
        configs = (GenerationConfig.from_pretrained(source, **loading.source), *configs)
    found: set[int] = set()
    for config in configs:
        ids = getattr(config, "eos_token_id", None)
        found |= {ids} if isinstance(ids, int) else set(ids or ())
    return found


def _heldout_name(options: Namespace) -> str:
    return "--heldout" if options.heldout else f"--heldout-share {options.heldout_share}"


def _stores(options: Namespace) -> tuple[TokenStore, TokenStore]:
    """The training side and the held-out side, tokenised."""
    from spd_lightning.data.cleaning import Cleaner, check_sources
    from spd_lightning.data.progress import progress_bar
    from spd_lightning.data.store import Encoding, default_folder, open_store

    def opened(name: str, sources: tuple[Source, ...], part: Part) -> TokenStore:
        cleaner = Cleaner(sources, common.cleaning(options), part, options.heldout_share if part != "all" else 0.0)
        encoding = Encoding(
            cleaner, options.tokenizer, common.loading(options), common.chat(options), options.max_length
        )
        folder = (options.cache or default_folder()).expanduser()
        with progress_bar(f"tokenising {name}") as progress:
            return open_store(encoding, folder, name, options.workers, progress)

    sources = common.sources(options)
    if any(source.weight != 1 for source in sources):
        print("note: weights of sources are not used, every row counts once", file=sys.stderr)
    if options.heldout is None:
        return opened("SOURCE", sources, "train"), opened(_heldout_name(options), sources, "heldout")
    heldout = check_sources("--heldout", options.heldout)
    return opened("SOURCE", sources, "all"), opened("--heldout", heldout, "all")


def _provenance(
    options: Namespace, argv: list[str], stores: tuple[TokenStore, ...], vocabulary: DraftVocabulary
) -> dict[str, Any]:
    from importlib.metadata import PackageNotFoundError, version

    versions = {}
    for name in ("spd_lightning", "transformers", "tokenizers", "numpy"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:  # a source tree on the path need not be installed
            continue
    sides = ("train", "heldout")
    return {
        "sources": {side: store.manifest["sources"] for side, store in zip(sides, stores, strict=True)},
        "heldout_share": options.heldout_share,
        "tokenizer": options.tokenizer,
        "target": options.target,
        "revision": options.revision,
        "chat": stores[0].manifest["chat"],
        "max_length": options.max_length,
        "stores": {side: store.path.name for side, store in zip(sides, stores, strict=True)},
        "labels": {"train": int(vocabulary.train.sum()), "heldout": int(vocabulary.heldout.sum())},
        "argv": ["spd-lightning", "data", "vocab", *argv],
        "versions": versions,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


# -- report ----------------------------------------------------------------------------------------------------------


def _report(options: Namespace, ids: _Ids, vocabulary: DraftVocabulary) -> None:
    from rich.console import Console

    from spd_lightning.data.vocabulary import table_sizes, time_lm_head

    sizes = table_sizes(ids.count, len(ids.always), vocabulary.size)
    timing = None
    if ids.hidden_size is not None:
        with Console(stderr=True).status("timing lm_head"):
            timing = time_lm_head(ids.hidden_size, sizes)
    console = Console(highlight=False, markup=False, emoji=False)
    console.print(_table(options.num_stages, sizes, vocabulary, timing))
    for line in _notes(ids, timing):
        console.print(line, style="dim", soft_wrap=True)
    train, heldout = vocabulary.coverage()
    console.print(
        f"\n{options.out}: {vocabulary.size} of {ids.count} ids, {len(ids.always)} of them special, "
        f"{int((vocabulary.train[vocabulary.token_ids] == 0).sum())} never seen. They cover {train:.2%} of "
        f"{vocabulary.train.sum():,} training labels and {heldout:.2%} of {vocabulary.heldout.sum():,} held-out ones.",
        soft_wrap=True,
    )


def _table(num_stages: int, sizes: list[int], vocabulary: DraftVocabulary, timing: Timing | None) -> Any:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from spd_lightning.data.vocabulary import constant_speedup

    table = Table(title=f"Draft vocabularies, n = {num_stages} stages", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    names = ["ids", "of all", "train", "held-out", "missed", *(f"S at p={p:.2f}" for p in ACCEPTANCES)]
    for name in names + ([] if timing is None else ["lm_head"]):
        table.add_column(name, justify="right", no_wrap=True)
    for size in sizes:
        train, heldout = vocabulary.coverage(size)
        cells = [str(size), f"{size / sizes[-1]:.1%}", f"{train:.2%}", f"{heldout:.2%}", f"{1 - heldout:.2%}"]
        for p in ACCEPTANCES:
            S = constant_speedup(num_stages, p * heldout)
            cells.append(f"{S:.2f} {S / constant_speedup(num_stages, p) - 1:+.1%}")
        if timing is not None:
            cells.append(f"{timing.seconds[size] * 1e3:.3f} ms")
        table.add_row(*cells, style="bold green" if size == vocabulary.size else None)
    return table


def _notes(ids: _Ids, timing: Timing | None) -> list[str]:
    lines = [
        "train, held-out: labels covered. missed: held-out labels outside, each a certain rejection.",
        "S: with acceptance p x coverage instead of p. An upper bound on the loss: a rare token that cannot be drafted "
        "might have been rejected anyhow.",
        "Labels stand for the target's own tokens: exactly so in regenerated data.",
    ]
    if timing is not None:
        return [
            *lines,
            f"lm_head: median time of [1, {ids.hidden_size}] x [{ids.hidden_size}, ids] in float32 here, CPU threads: "
            f"{timing.threads}. Its bytes are as 'of all'; they tell more where small ones fit into a cache.",
        ]
    reason = "--target measures its time" if ids.hidden_size is None else "no time: too large for the free memory"
    return [*lines, f"lm_head: its bytes are as 'of all'; {reason}."]
