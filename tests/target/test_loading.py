"""Ways of loading a target that change nothing but where and how its weights lie, and what is refused before that."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from spd_lightning.decoding.decoder import SpdDecoder, autoregressive_generate
from spd_lightning.errors import InputError
from spd_lightning.head.loading import new_head
from spd_lightning.target.loading import Loading, check_target, load_target
from spd_lightning.target.target import Target

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]


@pytest.fixture(scope="module", params=["llama", "qwen3_5_text", "gemma3_text"])
def folder(request: Any, make_target: Callable[..., Target], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target of 6 layers on disk: plain, hybrid, and with norms that store their weight minus one."""
    path = tmp_path_factory.mktemp("target")
    make_target(request.param, num_layers=6, hidden=64).model.save_pretrained(path)
    return path


def partly_on_disk(*more: str) -> dict[str, int | str]:
    """Every other layer on disk, and some other modules; the rest in memory."""
    modules = ["model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head"]
    places: dict[str, int | str] = {name: "disk" if name in more else "cpu" for name in modules}
    return places | {f"model.layers.{index}": ("disk", "cpu")[index % 2] for index in range(6)}


def check_decodes_alike(plain: Target, other: Target) -> None:
    heads = [new_head(target, num_layers=1) for target in (plain, other)]
    for name, weight in heads[0].state_dict().items():
        assert torch.equal(weight, heads[1].state_dict()[name]), name
    expected = autoregressive_generate(plain, PROMPT, 12).token_ids
    assert autoregressive_generate(other, PROMPT, 12).token_ids == expected
    assert SpdDecoder(other, heads[1]).generate(PROMPT, 12).token_ids == expected


@pytest.mark.parametrize("ends_on_disk", [False, True], ids=["layers", "layers, embedding, norm and lm_head"])
def test_a_target_offloaded_to_disk_gives_the_same_heads_and_tokens(
    folder: Path, tmp_path: Path, ends_on_disk: bool
) -> None:
    ends = ("model.embed_tokens", "model.norm", "lm_head") if ends_on_disk else ()
    loading = Loading(device_map=partly_on_disk(*ends), offload_folder=str(tmp_path))
    offloaded = load_target(folder, num_stages=3, loading=loading)
    assert next(offloaded.layer(0).parameters()).device.type == "meta" and offloaded.device.type == "cpu"
    check_decodes_alike(load_target(folder, num_stages=3), offloaded)
    ids = torch.tensor([PROMPT])
    for ours, theirs in zip(
        offloaded(ids, (0, 2, 6))[0], load_target(folder, num_stages=3)(ids, (0, 2, 6))[0], strict=True
    ):
        assert torch.equal(ours, theirs)


def test_a_surrounding_module_moves_or_casts_nothing_that_was_placed(folder: Path, tmp_path: Path) -> None:
    loading = Loading(device_map=partly_on_disk(), offload_folder=str(tmp_path))
    target = load_target(folder, num_stages=3, loading=loading)
    nn.ModuleList([target]).to("meta").double()
    assert target.dtype == torch.float32 and target.lm_head.weight.device.type == "cpu"
    check_decodes_alike(load_target(folder, num_stages=3), target)


@pytest.mark.parametrize("kind", ["auto", "sequential"])
def test_an_automatic_device_map_on_one_device_is_loading_as_usual(folder: Path, kind: str) -> None:
    check_decodes_alike(
        load_target(folder, num_stages=3), load_target(folder, num_stages=3, loading=Loading(device_map=kind))
    )


@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_a_quantised_target_decodes_its_own_greedy_tokens(
    folder: Path, quantization: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The product asks for a GPU; the package itself also runs on a CPU, so the path can be tested without one."""
    pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(Loading, "check", lambda self: None)
    if quantization == "4bit" and "linear_num_value_heads" in (folder / "config.json").read_text():
        pytest.skip("the 4-bit kernel for CPUs wants wider projections than the tiny gated delta rule has")
    target = load_target(folder, num_stages=3, loading=Loading(quantization=quantization))
    kinds = {type(module).__name__ for module in target.layer(3).modules()}
    assert {"4bit": "Linear4bit", "8bit": "Linear8bitLt"}[quantization] in kinds
    nn.ModuleList([target]).double()
    assert target.dtype == torch.float32, "quantised weights must not be cast"
    expected = autoregressive_generate(target, PROMPT, 12).token_ids
    assert SpdDecoder(target, new_head(target)).generate(PROMPT, 12).token_ids == expected
    ids = torch.tensor([PROMPT])
    library = target.model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, pad_token_id=0
    )
    assert library[0, len(PROMPT) :].tolist() == expected


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_attention_kernel_is_the_one_asked_for(folder: Path, attention: str) -> None:
    target = load_target(folder, num_stages=3, loading=Loading(attention=attention))
    assert target.config._attn_implementation == attention
    expected = autoregressive_generate(target, PROMPT, 12).token_ids
    assert SpdDecoder(target, new_head(target)).generate(PROMPT, 12).token_ids == expected


REFUSED: list[tuple[dict[str, Any], list[str]]] = [
    ({"quantization": "3bit"}, ["loading.quantization='3bit'", "4bit"]),
    ({"offload_folder": "x"}, ["offload_folder='x'", "device_map"]),
    ({"attention": "no_such_kernel"}, ["loading.attention='no_such_kernel'", "sdpa"]),
    ({"dtype": "int8"}, ["loading.dtype='int8'", "bfloat16"]),
    ({"dtype": "float8_e4m3fn"}, ["loading.dtype='float8_e4m3fn'", "bfloat16"]),
    ({"attention": "paged|eager"}, ["loading.attention='paged|eager'", "roll back"]),
    ({"device_map": "nonsense"}, ["loading.device_map='nonsense'", "sequential"]),
    ({"device_map": {"model.layers.0": "nowhere"}}, ["loading.device_map", "'model.layers.0'", "'nowhere'"]),
    ({"device_map": {"": 99}}, ["loading.device_map", "99", "GPUs here"]),
]


@pytest.mark.parametrize(("options", "says"), REFUSED, ids=[str(options) for options, _ in REFUSED])
def test_what_cannot_work_is_refused_before_weights_are_read(
    folder: Path, options: dict[str, Any], says: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("safetensors.safe_open", None)
    with pytest.raises(InputError) as error:
        load_target(folder, num_stages=3, loading=Loading(**options))
    assert all(word in str(error.value) for word in says) and "\n" not in str(error.value)


def test_a_checkpoint_that_needs_a_missing_package_is_not_called_damaged(
    make_target: Callable[..., Target], tmp_path: Path
) -> None:
    make_target("llama", num_layers=2).model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="cannot be loaded in this way.*quantization_config") as error:
        load_target(tmp_path, num_stages=2)
    assert "download" not in str(error.value)


def test_a_revision_of_a_folder_is_announced_as_unused(folder: Path) -> None:
    with pytest.warns(UserWarning, match="loading.revision='v1' is not used"):
        check_target(folder, loading=Loading(revision="v1"))


@pytest.mark.parametrize("missing", ["bitsandbytes", "GPU"])
def test_quantisation_without_its_package_or_a_gpu_is_refused_by_name(
    folder: Path, missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    present = None if missing == "bitsandbytes" else object()
    monkeypatch.setattr("spd_lightning.target.loading.find_spec", lambda name: present)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match=f"loading.quantization=4bit.*{missing}"):
        check_target(folder, loading=Loading(quantization="4bit"))


def test_a_device_map_without_accelerate_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spd_lightning.target.loading.find_spec", lambda name: None)
    with pytest.raises(InputError, match="device_map.*accelerate.*pip install"):
        check_target(folder, loading=Loading(device_map="auto"))


def test_offline_asks_nobody_for_a_model_that_is_not_here(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    from transformers import AutoConfig

    def record(source: Any, **options: Any) -> Any:
        asked.append(options)
        raise OSError("not here")

    monkeypatch.setattr(AutoConfig, "from_pretrained", record)
    for offline in (True, False):
        with pytest.raises(InputError, match="somebody/model"):
            load_target("somebody/model", loading=Loading(offline=offline, revision="v2"))
    assert [options["local_files_only"] for options in asked] == [True, False]
    assert [options["revision"] for options in asked] == ["v2", "v2"]


@pytest.mark.parametrize("trusted", [False, True])
def test_code_that_comes_with_a_model_runs_only_when_trusted(
    make_target: Callable[..., Target], tmp_path: Path, trusted: bool
) -> None:
    make_target("llama", num_layers=2).model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "configuration_own.OwnConfig"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "configuration_own.py").write_text(
        "from pathlib import Path\nfrom transformers import LlamaConfig\n"
        f"Path({str(tmp_path / 'ran')!r}).touch()\n"
        "class OwnConfig(LlamaConfig):\n    pass\n"
    )
    check_target(tmp_path, loading=Loading(trust_remote_code=trusted))
    assert (tmp_path / "ran").exists() == trusted


def test_trust_is_off_and_nothing_is_special_by_default() -> None:
    assert asdict(Loading()) == {
        "revision": None, "dtype": "auto", "attention": "auto", "device_map": None, "offload_folder": None,
        "quantization": "none", "offline": False, "trust_remote_code": False,
    }  # fmt: skip
