"""The flags by which commands name a target and a head, and how both are loaded."""

from __future__ import annotations

import json
from argparse import ArgumentTypeError, Namespace
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from spd_lightning.commands.parsing import CommandParser
from spd_lightning.errors import InputError

if TYPE_CHECKING:
    from spd_lightning.decoding.decoder import SpdDecoder
    from spd_lightning.decoding.launch import Member
    from spd_lightning.decoding.tree import Tree
    from spd_lightning.head.module import SpeculationHead
    from spd_lightning.target.target import Target


@dataclass(frozen=True)
class Models:
    """What a command decodes with; without a head only the baseline can run."""

    tokenizer: Any
    target: Target
    head: SpeculationHead | None
    decoder: SpdDecoder | None

    def encode(self, messages: Sequence[dict[str, Any]]) -> list[int]:
        """Token ids of a chat up to where the assistant begins to speak."""
        text = self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        return list(
            self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        )  # the template wrote them

    def encode_raw(self, text: str) -> list[int]:
        return list(self.tokenizer(text, verbose=False)["input_ids"])

    @property
    def chats(self) -> bool:
        """Whether the tokenizer has a chat template."""
        return bool(getattr(self.tokenizer, "chat_template", None))

    def decode(self, ids: Any) -> str:
        """Text without special tokens."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def add_model_flags(parser: CommandParser, head_required: bool = False) -> None:
    """Target, head and how they are loaded."""
    models = add_target_flags(parser)
    models.add_argument(
        "--head", required=head_required, help="run directory, exported folder, hub id, .ckpt or version-11 .pt"
    )
    models.add_argument("--num-stages", type=int, metavar="N", help="refuse a head with other than N stages")
    tree = parser.add_argument_group(
        "draft tree", "more than one continuation per cycle, as rows of one pass; in one process, for full attention"
    )
    tree.add_argument("--tree", type=int, metavar="K", help="up to K continuations enter per cycle (default: a chain)")
    tree.add_argument(
        "--tree-sharpness", type=float, metavar="X",
        help="the target's choice is surer than a draft's probabilities by this factor of logits (docs/quality.md)",
    )  # fmt: skip
    tree.add_argument(
        "--tree-gate", type=float, metavar="X",
        help="leave out what is worth less than X: its chance times the share of a restart that it saves (default: 0)",
    )  # fmt: skip


def check_tree(options: Namespace, ranks: bool) -> Tree | None:
    """The tree that flags ask for.

    Raises:
        InputError: it cannot be, with what else is asked for.
    """
    if options.tree is None:
        for flag, value in (("--tree-sharpness", options.tree_sharpness), ("--tree-gate", options.tree_gate)):
            if value is not None:
                raise InputError(f"{flag} {value:g} belongs to a tree: give --tree K too.")
        return None
    for name, wrong in (("--workers", ranks), ("--forced-acceptance", getattr(options, "forced_acceptance", None))):
        if wrong:
            raise InputError(f"--tree {options.tree}: a draft tree does not go together with {name}. Leave one out.")
    if options.head is None:
        raise InputError(f"--tree {options.tree}: a draft tree needs a head: give --head.")
    from spd_lightning.decoding.tree import Tree

    given = {"sharpness": options.tree_sharpness, "gate": options.tree_gate}
    return Tree(options.tree, **{name: value for name, value in given.items() if value is not None})


def add_target_flags(parser: CommandParser) -> Any:
    """A target and how it is loaded, one flag per field of `Loading`; returns their group."""
    models = parser.add_argument_group("models")
    models.add_argument("--target", required=True, help="folder or hub id of the target; 'tiny' is built in")
    models.add_argument("--dtype", default="auto", help="auto (bfloat16 on a GPU, else float32) or a torch name")
    models.add_argument("--revision", help="hub revision of the target: branch, tag or commit")
    models.add_argument("--attention", default="auto", help="the target's kernel: auto, eager, sdpa, ...")
    models.add_argument(
        "--device-map", metavar="MAP", type=_device_map, help="auto: spread a large target; or JSON {module: device}"
    )
    models.add_argument("--offload-folder", metavar="DIR", help="where weights lie that --device-map puts on disk")
    models.add_argument("--quantization", default="none", help="8bit or 4bit (bitsandbytes, GPU); default: none")
    models.add_argument("--offline", action="store_true", help="use only what is on this machine already")
    models.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the target")
    models.add_argument("--device", help="cpu, cuda, cuda:1, ...; default: a GPU where there is one")
    return models


def loading_of(options: Namespace) -> Any:
    """The `Loading` that flags ask for."""
    from spd_lightning.target.loading import Loading

    return Loading(**{field.name: getattr(options, field.name) for field in fields(Loading)})


def load_models(options: Namespace, me: Member | None = None, whole: bool = True) -> Models:
    """Tokenizer, target and head of parsed flags; of a rank, what it needs of them.

    Args:
        whole: whether a rank that leads keeps the whole target, for baselines.

    Raises:
        InputError: naming the flag.
    """
    import torch
    from transformers.utils.logging import disable_progress_bar

    from spd_lightning.decoding.decoder import SpdDecoder
    from spd_lightning.decoding.tree import TreeDecoder
    from spd_lightning.head.loading import load_head
    from spd_lightning.target.loading import check_target, load_target, load_tokenizer

    tree = check_tree(options, me is not None)
    if me is not None:
        from spd_lightning.commands.ranks import load_rank

        return load_rank(options, me, whole)
    disable_progress_bar()
    device = torch_device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    loading = loading_of(options)
    check_target(options.target, loading=loading, named=lambda name: "--" + name.replace("_", "-"))
    tokenizer = load_tokenizer(options.target, loading)
    target = load_target(options.target, num_stages=options.num_stages, device=device, loading=loading)
    head = None if options.head is None else load_head(options.head, target)
    if head is None:
        return Models(tokenizer, target, None, None)
    return Models(
        tokenizer, target, head, SpdDecoder(target, head) if tree is None else TreeDecoder(target, head, tree)
    )


def torch_device(name: str) -> Any:
    """The device of --device; InputError for one that is not there."""
    import torch

    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"--device {name}: expected cpu, cuda, cuda:1, ...") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"--device {name}: torch finds no GPU here. Use --device cpu.")
    return device


def _device_map(text: str) -> Any:
    """`auto`, a device, or a JSON mapping of modules to devices."""
    try:
        return json.loads(text) if text.startswith("{") else text
    except ValueError as error:
        raise ArgumentTypeError(f"{text!r} is no JSON ({error}): expected auto or {{module: device}}") from error
