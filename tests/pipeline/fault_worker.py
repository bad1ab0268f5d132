"""One rank of a small pipeline to which something happens: `python fault_worker.py HEAD_ALONE RANK WHEN WHAT`.

WHEN is the beginning of what a rank says that it is at ("cycle -1" is prefill); WHAT is a signal's name, an error to
be raised ("memory", "input"), `freeze` (the rank goes on giving signs of life and does nothing), or `other ...` (it
comes with another head, target, split, package or setting than the others).
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
from conftest import _make_target  # noqa: E402

from spd_lightning.decoding.launch import member  # noqa: E402
from spd_lightning.decoding.pipeline import PipelineDecoder  # noqa: E402
from spd_lightning.decoding.topology import Roles  # noqa: E402
from spd_lightning.errors import InputError  # noqa: E402
from spd_lightning.head.digest import weights_digest  # noqa: E402
from spd_lightning.head.loading import new_head  # noqa: E402


def main() -> None:
    alone, rank, when, what = sys.argv[1] == "alone", int(sys.argv[2]), sys.argv[3], sys.argv[4]
    torch.set_num_threads(1)
    with member(patience=float(sys.argv[5])) as me:
        print(f"pid {os.getpid()}", flush=True)
        n = me.world - alone
        me.play(Roles(n, tuple(range(me.world))).name(me.rank))
        other = what.removeprefix("other ") if what.startswith("other ") and me.rank == rank else ""
        if other == "version":
            torch.__version__ = "1.0.0"
        layers = [2] * (n - 2) + [1, 3] if other == "split" else [2] * n
        target = _make_target("llama", 2 * n, hidden=64 if other == "target" else 32, stage_layers=layers)
        head = new_head(target, seed=int(other == "head")).eval()

        def on_state(state: str) -> None:
            me.state = state
            if me.rank != rank or not state.startswith(when):
                return
            if what == "memory":
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            if what == "input":
                raise InputError("the logits are not finite: the weights of the target or the head are damaged.")
            if what == "freeze":
                time.sleep(600)
            os.kill(os.getpid(), getattr(signal, what))

        chunk = 7 if other == "chunk" else 256
        name = weights_digest(head)
        decoder = PipelineDecoder(target, head, prefill_chunk=chunk, on_state=on_state, names={"head": name})
        if not decoder.leads:
            decoder.follow()
            return
        for _ in range(1000):
            decoder.generate([1, 2, 3, 4], 200, forced_acceptance=0.9, eos_token_id=[])
        decoder.close()


if __name__ == "__main__":
    main()
