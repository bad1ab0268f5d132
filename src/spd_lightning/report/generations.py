"""Generations kept token by token: which were drafts, what was drafted where the target corrected, who was where."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from spd_lightning.report.plots import occupancy

if TYPE_CHECKING:
    from spd_lightning.decoding.decoder import CycleEvent
    from spd_lightning.decoding.generation import Generation

FORMAT = "spd-generations/1"
#: Colours of tokens where no style sheet is at hand: accepted drafts, corrections.
_INLINE = {True: "background:#d7f0ea", False: "background:#fbe3b0;font-weight:600", None: ""}


def sample(
    prompt: str, generation: Generation, events: Sequence[CycleEvent], text: Callable[[int], str]
) -> dict[str, Any]:
    """One generation as plain data.

    Args:
        prompt: its text.
        events: everything the decoder's observer saw, in order.
        text: of one token.

    Returns:
        prompt, acceptance, theoretical_speedup, cycles;
        tokens: [{"id", "text", "accepted": true | false | null (the first)}], and of a correction what was wrong, as
        "drafted_id" and "drafted";
        grid: per cycle [[fate, text or null] per stage] as in `occupancy`.
    """
    drafts: dict[int, int] = {}
    tokens: list[dict[str, Any]] = []
    for event in events:
        plan = event.cycle
        if event.emitted is not None:
            token: dict[str, Any] = {"id": event.emitted, "text": text(event.emitted), "accepted": event.accepted}
            if event.accepted is False and plan is not None and plan.leaving is not None:
                token["drafted_id"] = drafts[plan.leaving + 1]
                token["drafted"] = text(drafts[plan.leaving + 1])
            tokens.append(token)
        if plan is not None and event.drafted is not None and event.accepted is not False:
            drafts[plan.newest + 1] = event.drafted
    grid = occupancy(events, generation.num_stages)
    return {
        "prompt": prompt,
        "acceptance": generation.acceptance,
        "theoretical_speedup": generation.theoretical_speedup,
        "cycles": generation.cycles,
        "tokens": tokens,
        "grid": [[[fate, None if token is None else text(token)] for fate, token in row] for row in grid],
    }


def as_html(tokens: Sequence[Mapping[str, Any]], inline: bool = False) -> str:
    """Tokens as spans; classes accepted, corrected and first, or inline colours where there is no style sheet."""
    names = {True: "accepted", False: "corrected", None: "first"}
    spans = []
    for token in tokens:
        look = f'style="{_INLINE[token["accepted"]]}"' if inline else f'class="{names[token["accepted"]]}"'
        said = f' title="drafted: {escape(repr(token["drafted"]))}"' if token.get("drafted") is not None else ""
        spans.append(f"<span {look}{said}>{escape(token['text'])}</span>")
    style = ' style="white-space:pre-wrap;font-family:monospace"' if inline else ""
    return f"<div{style}>{''.join(spans)}</div>"
