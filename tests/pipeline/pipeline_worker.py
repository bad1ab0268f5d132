"""One rank of a pipeline that decodes many random cases: `python pipeline_worker.py FIRST COUNT`.

Every rank draws the same cases from their numbers. The rank that verifies decodes each of them in process too, and
prints what differs, as one JSON object per case.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from conftest import _make_target  # noqa: E402
from family.common import build, rejected_phases, tokens_for_every_phase  # noqa: E402
from torch import Tensor  # noqa: E402

from spd_lightning.decoding.decoder import CycleEvent, SpdDecoder, autoregressive_generate  # noqa: E402
from spd_lightning.decoding.drafters import Draft, HeadDrafter  # noqa: E402
from spd_lightning.decoding.launch import member  # noqa: E402
from spd_lightning.decoding.pipeline import PipelineDecoder  # noqa: E402
from spd_lightning.decoding.sampling import Sampling  # noqa: E402
from spd_lightning.decoding.schedule import Cycle  # noqa: E402
from spd_lightning.head.loading import new_head  # noqa: E402
from spd_lightning.randomness import Purpose, uniform  # noqa: E402

FAMILIES = ("llama", "qwen3", "qwen3_5_text")
VOCABULARY = 50
KINDS = ("head", "corrected .5", "corrected .8", "corrected 1", "sampled", "forced", "stopped", "phases")


class Corrected:
    """The real head, run for its rows; what it drafts is replaced by the right token, or by a wrong one.

    Whether it is right follows from position and attempt alone, so work that is dropped and done again drafts alike.
    """

    def __init__(self, head: Any, right: Sequence[int], acceptance: float, seed: int) -> None:
        self.inner, self.right, self.acceptance, self.seed = HeadDrafter(head), list(right), acceptance, seed
        self.staircase, self.draft_ids = self.inner.staircase, self.inner.draft_ids

    def start(self, prompt: Sequence[int], states: list[Tensor], capacity: int) -> None:
        self.inner.start(prompt, states, capacity)

    def draft(
        self, cycle: Cycle, kept: dict[int, Tensor], tokens: Sequence[int], sampling: Sampling, u: float
    ) -> Draft:
        self.inner.draft(cycle, kept, tokens, sampling, u)
        at = cycle.newest + 1
        assert len(tokens) == at
        right = self.right[at] if at < len(self.right) else 0
        if uniform(self.seed, Purpose.COIN, at, cycle.attempt) < self.acceptance:
            return Draft(right, None)
        return Draft((right + 1) % VOCABULARY, None)


class WrongInEveryPhase(Corrected):
    """Wrong once per run: at the draft that is made when f tokens are in flight, f = 1 .. n in turn."""

    def __init__(self, head: Any, right: Sequence[int]) -> None:
        super().__init__(head, right, 1.0, 0)
        self.began: list[int] = []

    def draft(
        self, cycle: Cycle, kept: dict[int, Tensor], tokens: Sequence[int], sampling: Sampling, u: float
    ) -> Draft:
        if len(tokens) < (self.began or [0])[-1]:
            self.began.clear()  # another generation
        if len(cycle.stages) == 1:
            self.began.append(cycle.newest)
        draft = super().draft(cycle, kept, tokens, sampling, u)
        phase = (len(self.began) - 1) % self.staircase.num_stages + 1
        if cycle.newest + 1 == self.began[-1] + phase:
            return Draft((draft.token + 1) % VOCABULARY, None)
        return draft


def case(number: int, world: int) -> dict[str, Any]:
    """Everything about a case, drawn from its number."""
    draw = random.Random(number * 10 + world)
    apart = draw.random() < 0.5 and world > 2
    n = world - 1 if apart else world
    layers = [draw.randint(1, 3) for _ in range(n)]
    if draw.random() < 0.2:
        layers[draw.randrange(n)] = 0
        layers[draw.randrange(n)] += 1
    family = draw.choice(FAMILIES)
    if family == "qwen3_5_text":  # every fourth layer attends, and a target needs one that does
        layers[draw.randrange(n)] += max(0, 4 - sum(layers))
    return {
        "number": number,
        "n": n,
        "apart": apart,
        "family": family,
        "layers": layers,
        "prompt": [draw.randrange(VOCABULARY) for _ in range(draw.choice((1, 2, 7, 19)))],
        "new": draw.choice((1, 2, n, 3 * n + 2, 40)),
        "chunk": draw.choice((3, 256)),
        "kind": draw.choice(KINDS),
        "dtype": torch.float64,
        "head_layers": draw.choice((1, 2)),
        "draft_ids": sorted(draw.sample(range(VOCABULARY), 30)) if draw.random() < 0.5 else None,
        "eos": draw.sample(range(VOCABULARY), 2) if draw.random() < 0.5 else [],
    }


def run(about: dict[str, Any]) -> dict[str, Any] | None:
    target = build(_make_target, about["family"], about["layers"], vocab=VOCABULARY, seed=about["number"])
    target.model.double()
    head = (
        new_head(target, num_layers=about["head_layers"], draft_token_ids=about["draft_ids"], seed=about["number"])
        .double()
        .eval()
    )
    drafter: Any = head
    kind, n = about["kind"], about["n"]
    new = max(about["new"], 2 * tokens_for_every_phase(n)) if kind == "phases" else about["new"]
    options: dict[str, Any] = {"eos_token_id": about["eos"]}
    if kind.startswith("corrected") or kind == "phases":
        plain = autoregressive_generate(target, about["prompt"], new + n + 3, eos_token_id=[])
        right = [*about["prompt"], *plain.token_ids]
        options["eos_token_id"] = [] if kind == "phases" else about["eos"]
        drafter = (
            WrongInEveryPhase(head, right)
            if kind == "phases"
            else Corrected(head, right, float(kind.split()[1]), about["number"])
        )
    elif kind == "sampled":
        options |= {"temperature": 0.9, "top_p": 0.95, "seed": about["number"]}
    elif kind == "forced":
        options |= {"forced_acceptance": 0.7, "seed": about["number"], "eos_token_id": []}
    world = about["n"] + about["apart"]
    decoder = PipelineDecoder(target, drafter, range(world), prefill_chunk=about["chunk"])
    stop = (lambda tokens: len(tokens) >= 3) if kind == "stopped" else None
    differs: list[str] = []
    if not decoder.leads:
        decoder.follow()
        return None
    found, events = None, list[CycleEvent]()
    for repeat in range(2):  # the second generation finds what the first one left behind
        events, expected_events = [], list[CycleEvent]()
        observer = events.append if repeat else None
        found = decoder.generate(about["prompt"], new, **options, stop=stop, observer=observer)
        expected = SpdDecoder(target, drafter).generate(
            about["prompt"], new, **options, stop=stop, observer=expected_events.append
        )
        differs += [
            f"{repeat} {name}: {getattr(found, name)} instead of {getattr(expected, name)}"
            for name in ("token_ids", "cycles", "drafts_verified", "drafts_accepted", "restart_positions")
            if getattr(found, name) != getattr(expected, name)
        ]
        if repeat and events != expected_events:
            differs.append("events")
    decoder.close()
    assert found is not None
    told = {"dtype": "float64", "differs": differs, "tokens": len(found.token_ids)}
    return about | told | {"restarts": len(found.restart_positions), "phases": sorted(set(rejected_phases(events)))}


def main() -> None:
    torch.set_num_threads(1)
    first, count = map(int, sys.argv[1:3])
    with member():
        for number in range(first, first + count):
            told = run(case(number, dist.get_world_size()))
            if told is not None:
                print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
