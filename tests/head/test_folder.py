"""A head's folder: what it holds, and that no damage and no malice makes another head of it, or a crash."""

from __future__ import annotations

import hashlib
import json
import random
import resource
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save_file

from spd_lightning.errors import InputError
from spd_lightning.head.folder import CONFIG_FILE, WEIGHTS_FILE, read_head, save_head
from spd_lightning.head.loading import load_head, new_head
from spd_lightning.head.module import SpeculationHead
from spd_lightning.target.identity import TargetIdentity
from spd_lightning.target.target import Target


@pytest.fixture(scope="module")
def head(make_target: Callable[..., Target]) -> SpeculationHead:
    head = new_head(make_target(num_layers=4, vocab=64, num_stages=4), draft_token_ids=range(3, 60))
    head.origin = TargetIdentity(source="someone/target", model_type="llama", tokenizer_digest="0" * 64)
    return head


def tensors_in(path: Path) -> dict[str, torch.Tensor]:
    """Not mapped: the tests overwrite the file."""
    return load(path.read_bytes())


def reseal(folder: Path, **changes: Any) -> None:
    """Edit config.json as someone who wants to deceive: the seal and the weights' digest are computed anew."""
    path, weights = folder / CONFIG_FILE, folder / WEIGHTS_FILE
    content = json.loads(path.read_text())
    content["weights"] = {
        "bytes": weights.stat().st_size,
        "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
    }
    content = {name: value for name, value in {**content, **changes}.items() if value is not ... and name != "seal"}
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    path.write_text(json.dumps({**content, "seal": hashlib.sha256(canonical.encode()).hexdigest()}))


def refusal(folder: Path, *says: str) -> None:
    """Loading ends with one line that says all of this."""
    with pytest.raises(InputError) as caught:
        load_head(folder)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 600, message
    assert all(word in message for word in [*says, str(folder)]), f"{says} in {message!r}"


def same_head(a: SpeculationHead, b: SpeculationHead) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    tensors = ours.keys() == theirs.keys() and all(
        x.dtype == theirs[name].dtype and torch.equal(x, theirs[name]) for name, x in ours.items()
    )
    buffers = all(torch.equal(x, dict(b.named_buffers())[name]) for name, x in a.named_buffers())
    return tensors and buffers and a.config == b.config and a.origin == b.origin


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_saved_head_is_the_head_that_is_loaded(head: SpeculationHead, tmp_path: Path, dtype: torch.dtype) -> None:
    import copy

    stored = copy.deepcopy(head).to(dtype)
    save_head(stored, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [CONFIG_FILE, WEIGHTS_FILE]
    assert same_head(read_head(tmp_path), stored)


def test_a_loaded_head_can_be_trained_on(head: SpeculationHead, tmp_path: Path) -> None:
    save_head(head, tmp_path)
    before = hashlib.sha256((tmp_path / WEIGHTS_FILE).read_bytes()).hexdigest()
    loaded = load_head(tmp_path).train()
    trained = [name for name, p in loaded.named_parameters() if p.requires_grad]
    assert trained == [name for name, p in head.named_parameters() if p.requires_grad]
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.add_(1)
    assert hashlib.sha256((tmp_path / WEIGHTS_FILE).read_bytes()).hexdigest() == before


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"format": "spd-head/9"}, ["config.json", '"format": "spd-head/2"', "spd-head/9"]),
        ({"format": ...}, ["config.json", '"format": "spd-head/2"']),
        ({"weights": {"bytes": "1", "sha256": 2}}, ["config.json", "weights="]),
        ({"weights": {"bytes": 1, "sha256": "0" * 64}}, ["model.safetensors", "expected 1 bytes"]),
        ({"target": ...}, ["config.json", "target"]),
        ({"target": {"source": "../../etc", "run": "rm"}}, ["target="]),
        ({"target": {"model_type": 3}}, ["target.model_type=3"]),
        ({"colour": "red"}, ["config.json", "unknown fields ['colour']"]),
        ({"num_layers": ...}, ["config.json", "num_layers"]),
        ({"anchors": [1, 4]}, ["config.json", "anchors=[1, 4]"]),
        ({"anchors": "all"}, ["config.json", "anchors=all"]),
        ({"anchors": [0, 1.5]}, ["config.json", "anchors=[0, 1.5]"]),
        ({"stage_layers": [1.9, 2.1]}, ["config.json", "stage_layers=[1.9, 2.1]"]),
        ({"stage_layers": [4]}, ["config.json", "at least two stages"]),
        ({"num_layers": 3}, ["model.safetensors", "layers.2", "no such tensor"]),
        ({"num_layers": 1}, ["model.safetensors", "layers.1", "no such tensor"]),
        ({"num_layers": True}, ["config.json", "num_layers=True"]),
        ({"num_layers": 10**9}, ["model.safetensors", "1000000000 layers"]),
        ({"hidden_size": 10**9}, ["model.safetensors", "describes no head"]),
        ({"hidden_size": 10**30}, ["config.json", "hidden_size"]),
        ({"intermediate_size": 2**31 - 1, "hidden_size": 2**31 - 1}, ["model.safetensors"]),
        ({"head_dim": 2**30}, ["model.safetensors", "expected"]),
        (
            {
                "max_position_embeddings": 2**31 - 1,
                "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
            },
            [],
        ),
        ({"vocab_size": 50}, ["draft_token_ids", "within 0..49"]),
        ({"draft_token_ids": None}, ["lm_head.weight: expected [64, 32]", "[57, 32]"]),
        ({"draft_token_ids": [3, 99]}, ["draft_token_ids", "within 0..63"]),
        ({"draft_token_ids": [3, 3]}, ["draft_token_ids", "distinct"]),
        ({"hidden_act": "no_such"}, ["config", "no_such"]),
        ({"hidden_act": ["silu"]}, ["hidden_act=['silu']"]),
        ({"hidden_size": -1}, ["config.json", "hidden_size=-1"]),
        ({"num_layers": "two"}, ["config.json", "num_layers='two'"]),
        ({"num_key_value_heads": 3}, ["config.json", "num_attention_heads=4"]),
        ({"rms_norm_eps": "small"}, ["config.json", "rms_norm_eps='small'"]),
        ({"rms_norm_eps": -1e-6}, ["config.json", "rms_norm_eps=-1e-06"]),
        ({"rope_parameters": {"rope_type": "no_such", "rope_theta": 1e4}}, ["config", "no_such"]),
        ({"rope_parameters": None}, ["config.json", "rope_parameters=None"]),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1e9}},
            ["partial_rotary_factor"],
        ),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": "x"}}, ["config"]),
        ({"rope_parameters": {"rope_type": "default"}}, ["config", "rope_theta"]),
        ({"kind": "banana"}, ["config.json", "kind='banana'"]),
        ({"logit_softcap": 0.0}, ["config.json", "logit_softcap=0.0"]),
        ({"logit_softcap": "x"}, ["config.json", "logit_softcap='x'"]),
        ({"style": {"norms": "around"}}, ["style.norms='around'", "before"]),
        ({"style": {"qk_norm": 1}}, ["style.qk_norm=1", "head, row, none"]),
        ({"style": {"gate": "yes"}}, ["style.gate='yes'", "true or false"]),
        ({"style": {"colour": 1}}, ["config.json", "colour"]),
        ({"style": "plain"}, ["config.json", "style='plain'"]),
        ({"hidden_size": 33}, ["model.safetensors", "expected"]),
    ],
    ids=lambda case: ", ".join(case) if isinstance(case, dict) else "",
)
def test_a_field_that_cannot_be_is_refused_even_under_a_fresh_seal(
    head: SpeculationHead, tmp_path: Path, change: dict[str, Any], says: list[str]
) -> None:
    save_head(head, tmp_path)
    reseal(tmp_path, **change)
    if says:
        refusal(tmp_path, *says)
    else:  # strange but possible
        load_head(tmp_path)


def test_an_edited_config_is_refused_by_its_seal(head: SpeculationHead, tmp_path: Path) -> None:
    save_head(head, tmp_path)
    path = tmp_path / CONFIG_FILE
    path.write_text(path.read_text().replace("1e-06", "1e-05"))
    refusal(tmp_path, "config.json was changed after it was written", "Copy or export the head again")


@pytest.mark.parametrize(
    "content",
    [b"", b"[1]", b"{", b"\xff\xfe", b"[" * 100_000, b'{"format": NaN}', b'{"format": 1, "format": 2}', b"9" * 10_000],
    ids=["empty", "list", "cut", "no text", "deep", "no number", "twice", "long number"],
)
def test_what_is_no_config_is_refused(head: SpeculationHead, tmp_path: Path, content: bytes) -> None:
    save_head(head, tmp_path)
    (tmp_path / CONFIG_FILE).write_bytes(content)
    refusal(tmp_path, "config.json")


def _header_of(length: int) -> bytes:
    return struct.pack("<Q", length) + b"{}"


@pytest.mark.parametrize(
    "weights",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-8]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(_header_of(2**62)),
        lambda path: path.write_bytes(_header_of(200_000_000)),
        lambda path: torch.save(tensors_in(path), path),
        lambda path: save_file({k: v.to(torch.int32) for k, v in tensors_in(path).items()}, path),
        lambda path: save_file({k: v for k, v in tensors_in(path).items() if k != "norm.weight"}, path),
        lambda path: save_file({**tensors_in(path), "../evil": torch.ones(1)}, path),
        lambda path: save_file({k: v.flatten() for k, v in tensors_in(path).items()}, path),
        lambda path: save_file({**tensors_in(path), "norm.weight": torch.ones(32, dtype=torch.int64)}, path),
        lambda path: path.write_bytes(json.dumps({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}})
                                      .encode().join([struct.pack("<Q", 68), b""])),
    ],
    ids=[
        "truncated", "empty", "endless header", "large header", "pickle", "integers", "a tensor less", "a tensor more",
        "flat", "one of integers", "a tensor beyond the end",
    ],
)  # fmt: skip
def test_weights_that_are_none_are_refused_even_under_a_fresh_seal(
    head: SpeculationHead, tmp_path: Path, weights: Callable[[Path], Any]
) -> None:
    save_head(head, tmp_path)
    weights(tmp_path / WEIGHTS_FILE)
    reseal(tmp_path)
    refusal(tmp_path, "model.safetensors")


def test_a_pickle_under_the_name_of_the_weights_runs_nothing(head: SpeculationHead, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "evil",)

    save_head(head, tmp_path)
    for name in (WEIGHTS_FILE, "head.pt", "head.ckpt"):
        torch.save({"state_dict": Evil(), "config": Evil()}, tmp_path / name)
    reseal(tmp_path)
    refusal(tmp_path, "model.safetensors")
    for name in ("head.pt", "head.ckpt"):
        with pytest.raises(InputError):
            load_head(tmp_path / name)
    assert not (tmp_path / "evil").exists()


def test_a_hostile_config_allocates_nothing_of_the_size_it_names(head: SpeculationHead, tmp_path: Path) -> None:
    save_head(head, tmp_path)
    reseal(tmp_path, hidden_size=2**30, intermediate_size=2**30, head_dim=2**30, vocab_size=2**31 - 1)
    program = (
        "import resource, sys; from spd_lightning import load_head; from spd_lightning.errors import InputError\n"
        "import spd_lightning.head.module\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try: load_head(sys.argv[1])\n"
        "except InputError: print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True)
    grown = int(done.stdout) * (1 if sys.platform != "darwin" else 1 / 1024)  # KiB
    assert grown < 100 * 1024
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > 0


# -- fuzzing ---------------------------------------------------------------------------------------------------------


def _flip_byte(folder: Path, draw: random.Random) -> str:
    path = folder / draw.choice([CONFIG_FILE, WEIGHTS_FILE])
    content = bytearray(path.read_bytes())
    at = draw.randrange(len(content))
    content[at] ^= 1 << draw.randrange(8)
    path.write_bytes(content)
    return f"bit of byte {at} of {path.name}"


def _move_bytes(folder: Path, draw: random.Random) -> str:
    path = folder / draw.choice([CONFIG_FILE, WEIGHTS_FILE])
    content = path.read_bytes()
    at, size = draw.randrange(len(content)), draw.choice([1, 8, 64, 4096])
    kind = draw.choice(["cut out", "cut off", "doubled", "zeroed", "appended"])
    piece = content[at : at + size]
    path.write_bytes(
        {
            "cut out": content[:at] + content[at + size :],
            "cut off": content[:at],
            "doubled": content[:at] + piece + content[at:],
            "zeroed": content[:at] + bytes(len(piece)) + content[at + size :],
            "appended": content + draw.randbytes(size),
        }[kind]
    )
    return f"{kind}: {size} bytes at {at} of {path.name}"


STRANGE: list[Any] = [
    None,
    True,
    0,
    -1,
    1,
    2,
    7,
    2**31,
    10**18,
    0.5,
    1e300,
    "",
    "x",
    "../..",
    [],
    [0],
    [1, 1],
    {},
    {"a": 1},
]


def _change_field(folder: Path, draw: random.Random, fresh_seal: bool = False) -> str:
    content = json.loads((folder / CONFIG_FILE).read_text())
    place, name = content, draw.choice(sorted(content))
    if isinstance(content[name], dict) and content[name] and draw.random() < 0.5:
        place, name = content[name], draw.choice(sorted(content[name]))
    how = draw.choice(["drop", "replace", "rename"])
    old = place.pop(name)
    if how == "replace":
        place[name] = draw.choice([value for value in STRANGE if value != old])
    elif how == "rename":
        place[f"{name}x"] = old
    (folder / CONFIG_FILE).write_text(json.dumps(content))
    if fresh_seal:
        reseal(folder)
    return f"{how} {name} -> {place.get(name)!r:.40}"


def _change_tensor(folder: Path, draw: random.Random) -> str:
    path = folder / WEIGHTS_FILE
    tensors = tensors_in(path)
    name = draw.choice(sorted(tensors))
    tensor = tensors.pop(name)
    how = draw.choice(["drop", "rename", "transpose", "shorter", "integers", "swap"])
    if how == "rename":
        tensors[draw.choice([f"{name}x", name[1:], "", "../" + name, name.upper()])] = tensor
    elif how == "transpose":
        tensors[name] = tensor[None]
    elif how == "shorter":
        tensors[name] = tensor[:-1].clone()
    elif how == "integers":
        tensors[name] = tensor.to(torch.int8)
    elif how == "swap":
        other = draw.choice([other for other in sorted(tensors) if tensors[other].shape != tensor.shape])
        tensors[name], tensors[other] = tensors[other], tensor
    save_file(tensors, path)
    reseal(folder)
    return f"{how} {name}"


@pytest.mark.parametrize("number", range(240))
def test_a_mutated_folder_is_refused_or_the_same_head(head: SpeculationHead, tmp_path: Path, number: int) -> None:
    draw = random.Random(number)
    save_head(head, tmp_path)
    original = read_head(tmp_path)
    kept = {name: tensor.clone() for name, tensor in original.state_dict().items()}
    mutate = (_flip_byte, _move_bytes, _change_field, _change_tensor)[number % 4]
    what = mutate(tmp_path, draw)
    try:
        found = load_head(tmp_path)
    except InputError as error:
        assert str(error) and "\n" not in str(error), what
        return
    original.load_state_dict(kept, assign=True)
    assert same_head(found, original), what


@pytest.mark.parametrize("number", range(120))
def test_a_mutated_field_under_a_fresh_seal_never_crashes(head: SpeculationHead, tmp_path: Path, number: int) -> None:
    save_head(head, tmp_path)
    _change_field(tmp_path, random.Random(number), fresh_seal=True)
    try:
        load_head(tmp_path)
    except InputError as error:
        assert str(error) and "\n" not in str(error)
