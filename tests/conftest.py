"""Shared fixtures: tiny random targets in memory, and the golden data where it is present."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import families
import pytest

# Before torch is imported: the models are tiny, and test workers share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

if TYPE_CHECKING:
    import torch

    from spd_lightning.target.target import Target

ROOT = Path(__file__).resolve().parents[1]
pytest_plugins = ["family_table", "recording", "scale_runs", "small_run"]


#: What starts processes of its own takes long, and begins first: the last file of a run has a worker for itself.
LONG = ("scale/", "pipeline/", "training/test_run", "test_readme", "commands/", "bench/", "export/")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not any(name in item.nodeid for name in LONG))


@pytest.fixture(scope="session", autouse=True)
def one_torch_thread() -> Iterator[None]:
    """One thread for whoever imported torch during collection; nobody else pays for the import."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
    yield


@pytest.fixture(scope="session", autouse=True)
def no_tracking() -> Iterator[None]:
    """Runs of tests are logged to no W&B run; tests of tracking say otherwise."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "disabled")
        yield


@pytest.fixture(scope="session", autouse=True)
def datasets_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What `datasets` and the stores of tokens cache belongs to the session, not to the user's home."""
    os.environ["SPD_CACHE"] = str(tmp_path_factory.mktemp("tokens"))
    if "HF_DATASETS_CACHE" not in os.environ:
        os.environ["HF_DATASETS_CACHE"] = str(tmp_path_factory.mktemp("datasets"))
        if "datasets" in sys.modules:
            sys.modules["datasets"].config.HF_DATASETS_CACHE = os.environ["HF_DATASETS_CACHE"]


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder of the golden data of the published implementation (not part of the repository)."""
    path = Path(os.environ.get("SPD_GOLDEN", ROOT.parent / "shared" / "golden")).resolve()
    if not (path / "llama" / "golden.json").is_file():
        pytest.skip("no golden data: set SPD_GOLDEN to the folder that holds llama/golden.json")
    return path


def _make_target(
    family: str = "llama",
    num_layers: int = 4,
    hidden: int = 32,
    vocab: int = 60,
    seed: int = 0,
    num_stages: int | None = None,
    stage_layers: Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
    tie: bool = False,
    spread: float = 0.25,
    embedding_scale: float = 1.0,
    **config: Any,
) -> Target:
    """A random target in memory.

    Args:
        family: model_type, one of tests/families.py; llama and qwen3 come plain, without what that table adds.
        hidden: hidden size; 4 query heads of hidden / 4 (at least 8) share 2 key/value heads.
        spread: initializer_range, wide enough for argmaxes to vary from position to position.
        embedding_scale: factor on the embedding. With 4 and spread=0.05 an untrained head is right half of the
            time, because little happens between h_0 and h_L.
        config: further fields of the family's config. No id ends a generation unless eos_token_id is given.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from spd_lightning.target.target import Target

    values: dict[str, Any] = {
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": max(8, hidden // 4),
        "vocab_size": vocab,
        "initializer_range": spread,
        "max_position_embeddings": 256,
        "tie_word_embeddings": tie,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    if family not in ("llama", "qwen3"):
        values.update(families.fields(family, num_layers))
    values.update(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **values), dtype=torch.float32)
        for name, parameter in model.named_parameters():  # a norm of ones hides a norm that is applied twice
            if "norm" in name:
                parameter.data.add_(0.2 * torch.randn_like(parameter))
        model.get_input_embeddings().weight.data.mul_(embedding_scale)
    if num_stages is not None or stage_layers is not None:
        return Target(model.to(dtype or torch.float32)).partition(num_stages, stage_layers)
    return Target(model.to(dtype or torch.float32))


@pytest.fixture(scope="session")
def make_target() -> Callable[..., Target]:
    """The factory of tiny random targets, see `_make_target` for its arguments."""
    return _make_target
