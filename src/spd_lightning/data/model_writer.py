"""Responses by a model in this process: transformers' own `generate`, a batch of prompts at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from spd_lightning.data.chat import ChatEncoder, ChatOptions
from spd_lightning.data.dialogue import Answer, Dialogue, Sampling, Thoughts, Unit, Writer, Written
from spd_lightning.errors import InputError, first_line

if TYPE_CHECKING:
    from spd_lightning.target.target import Target


class ModelWriter(Writer):
    """Writes with a loaded target.

    Args:
        target: the target.
        tokenizer: its tokenizer, with a chat template.
        chat: how prompts are rendered.
        sampling: how tokens are chosen; the defaults are those of the model's generation_config.

    Raises:
        InputError: a tokenizer without a chat template, or choices that contradict one another.
    """

    def __init__(self, target: Target, tokenizer: Any, chat: ChatOptions, sampling: Sampling) -> None:
        self.model: Any = target.model
        self.tokenizer, self.sampling = tokenizer, sampling
        self.context = target.context_length
        self.encoder = ChatEncoder(tokenizer, self.context, chat)
        if not self.encoder.template:
            raise InputError(
                f"The tokenizer {tokenizer.name_or_path!r} has no chat template: expected that of an instruct model. "
                "Set --chat-template to a file with one."
            )
        self.thoughts = Thoughts(self.encoder.template)
        ends = target.end_of_sequence_ids() or {tokenizer.eos_token_id} - {None}
        self.ends = frozenset(int(index) for index in ends)
        # generate() fills what is missing from the model's own, so this has to be the model's own
        self.model.generation_config = self._generation_config()
        self.facts = self._facts()

    def _generation_config(self) -> Any:
        config, wanted = copy.deepcopy(self.model.generation_config), self.sampling
        samples = bool(config.do_sample) if wanted.temperature is None else wanted.temperature > 0
        if not samples and (wanted.top_p is not None or wanted.top_k is not None):
            raise InputError("--top-p and --top-k choose among sampled tokens: give --temperature above 0 too.")
        chosen = {"temperature": wanted.temperature, "top_p": wanted.top_p, "top_k": wanted.top_k}
        values = {k: v for k, v in chosen.items() if v is not None} if samples else dict.fromkeys(chosen)
        if samples and config.top_k is None:
            values.setdefault("top_k", 0)  # generate() would fill in 50
        config.update(
            **values,
            do_sample=samples,
            max_new_tokens=wanted.max_new_tokens,
            max_length=None,
            eos_token_id=sorted(self.ends) or None,
            pad_token_id=self._padding,
            num_beams=1,
            num_return_sequences=1,
            return_dict_in_generate=False,
        )
        return config

    @property
    def _padding(self) -> int:
        """What fills a row on the left, behind the mask, and on the right after its end: any id serves."""
        known = self.tokenizer.pad_token_id
        return int(known) if known is not None else min(self.ends, default=0)

    def _facts(self) -> dict[str, Any]:
        import torch
        import transformers

        generation = self.model.generation_config.to_diff_dict()
        return {
            "generation": {k: v for k, v in generation.items() if isinstance(v, (str, int, float, list, type(None)))},
            "seed": self.sampling.seed,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "device": str(self.model.device),
            "chat": asdict(self.encoder.options),
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        }

    def write(self, units: Iterable[Unit], done: Callable[[Written], None]) -> None:
        for unit in units:
            turn = 0
            while writing := [dialogue for dialogue in unit.dialogues if dialogue.is_open]:
                self._turn(unit, turn, writing)
                turn += 1
            done(Written(unit))

    def _turn(self, unit: Unit, turn: int, dialogues: Sequence[Dialogue]) -> None:
        """The next turn of every dialogue, as one batch."""
        import torch

        asked = []
        for dialogue in dialogues:
            text = self._prompt(dialogue)
            if text is None:
                continue
            ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            if len(ids) >= self.context:
                dialogue.end(f"prompt fills the context of {self.context} tokens")
            else:
                asked.append((dialogue, text, ids))
        if not asked:
            return
        torch.manual_seed(self.sampling.seed_of(unit.number, turn))
        for (dialogue, text, prompt), ids in zip(asked, self._generate([ids for _, _, ids in asked]), strict=True):
            dialogue.answer(self._answer(text, len(prompt), ids))

    def _prompt(self, dialogue: Dialogue) -> str | None:
        try:
            return self.encoder.prompt_text(dialogue.messages, dialogue.given.tools)
        except Exception as error:  # a template raises whatever jinja2 and Python raise
            dialogue.end(f"the chat template raises {type(error).__name__}: {first_line(error)}")
            return None

    def _generate(self, prompts: Sequence[list[int]]) -> list[list[int]]:
        """New ids of each prompt, padding after the end included; a batch too large for the GPU goes in halves."""
        import torch

        longest = max(map(len, prompts))
        ids = torch.full((len(prompts), longest), self._padding)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):  # padded on the left: generation goes on at the right
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        place = self.model.get_input_embeddings().weight.device
        try:
            with torch.inference_mode():
                made = self.model.generate(ids.to(place), attention_mask=mask.to(place))
            return [row[longest:] for row in made.tolist()]
        except torch.OutOfMemoryError as error:
            if len(prompts) == 1:
                raise InputError(
                    f"a prompt of {longest} tokens and --max-new-tokens {self.sampling.max_new_tokens} do not fit this "
                    "GPU: take --device-map auto, --quantization, or fewer new tokens."
                ) from error
        torch.cuda.empty_cache()
        half = len(prompts) // 2
        return self._generate(prompts[:half]) + self._generate(prompts[half:])

    def _answer(self, prompt: str, prompt_tokens: int, ids: Sequence[int]) -> Answer:
        """What new ids say: up to the first end-of-turn token, within the context."""
        ids = ids[: self.context - prompt_tokens]
        end = next((place for place, index in enumerate(ids) if index in self.ends), None)
        text = self.tokenizer.decode(
            ids[:end], skip_special_tokens=not self.thoughts.in_channels, clean_up_tokenization_spaces=False
        )
        content, thoughts = self.thoughts.split(str(text), prompt)
        counted = len(ids) if end is None else end + 1
        return Answer(content, "length" if end is None else "stop", counted, prompt_tokens, thoughts)
