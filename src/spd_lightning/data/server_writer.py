"""Responses by any OpenAI-compatible server (vLLM, SGLang, llama.cpp, ...), many conversations at a time.

The client's own retries meet rate limits (with Retry-After), faults of the server, timeouts and lost connections; what
still fails is one conversation's loss, unless the server is gone. Nothing here imports torch.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from spd_lightning.data.dialogue import Answer, Dialogue, Sampling, Unit, Writer, Written
from spd_lightning.errors import InputError, first_line

#: Seconds that a server may take to say that it is there.
_PATIENCE = 30.0


@dataclass(frozen=True)
class Server:
    """Where and how to ask.

    Args:
        base_url: of the API, normally ending in /v1.
        model: as the server names it; None: the only one that it serves.
        api_key: sent along; servers of one's own take any.
        concurrency: conversations that are asked for at a time.
        timeout: seconds per request.
        retries: of a request.
        chat_arguments: for the chat template, such as enable_thinking: false.
    """

    base_url: str
    model: str | None = None
    api_key: str = field(default="none", repr=False)
    concurrency: int = 32
    timeout: float = 600.0
    retries: int = 8
    chat_arguments: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.base_url.startswith(("http://", "https://")):
            raise InputError(f"--base-url {self.base_url!r}: expected a URL such as http://localhost:8000/v1.")
        if self.concurrency < 1:
            raise InputError(f"--concurrency {self.concurrency}: expected at least 1.")
        if not self.timeout > 0:
            raise InputError(f"--timeout {self.timeout}: expected seconds above 0.")
        if self.retries < 0:
            raise InputError(f"--retries {self.retries}: expected at least 0.")


class ServerWriter(Writer):
    """Writes by asking a server.

    Args:
        server: where and how to ask.
        sampling: how tokens are chosen; the defaults are the server's.

    Raises:
        InputError: no package openai, or a server that is not there, refuses the key or does not say what it serves.
    """

    def __init__(self, server: Server, sampling: Sampling) -> None:
        try:
            import openai
        except ImportError as error:
            raise InputError(
                "--base-url needs the package openai, which is not installed: pip install 'spd_lightning[server]'."
            ) from error
        self.server, self.sampling = server, sampling
        self._errors: Any = openai
        self._repeated = (openai.APIConnectionError, openai.RateLimitError, openai.InternalServerError)
        self.model = asyncio.run(self._first_contact())
        self.facts: dict[str, Any] = {
            "base_url": server.base_url,
            "model": self.model,
            "generation": {k: v for k, v in asdict(sampling).items() if v is not None and k != "seed"},
            "seed": sampling.seed,
            "chat": {"arguments": server.chat_arguments},
            "versions": {"openai": openai.__version__},
        }

    def write(self, units: Iterable[Unit], done: Callable[[Written], None]) -> None:
        asyncio.run(self._write(iter(units), done))

    def _client(self) -> Any:
        from openai import AsyncOpenAI

        server = self.server
        return AsyncOpenAI(
            base_url=server.base_url, api_key=server.api_key, timeout=server.timeout, max_retries=server.retries
        )

    # -- contact -----------------------------------------------------------------------------------------------------

    async def _first_contact(self) -> str:
        """The name of the model."""
        async with self._client() as client:
            served = await self._served(client, retries=2)
        if self.server.model is not None:
            if served and self.server.model not in served:
                raise InputError(
                    f"--model {self.server.model!r}: {self.server.base_url} serves {', '.join(served[:10])}."
                )
            return self.server.model
        if served is None or len(served) != 1:
            found = f"serves {', '.join(served[:10])}" if served else "does not list its models (is /v1 missing?)"
            raise InputError(f"--base-url {self.server.base_url} {found}: say which one with --model.")
        return served[0]

    async def _served(self, client: Any, retries: int = 0) -> list[str] | None:
        """Names of the models that the server serves; None where it does not list them.

        Raises:
            InputError: it does not answer, or refuses the key.
        """
        url = self.server.base_url
        patient = client.with_options(max_retries=retries, timeout=min(self.server.timeout, _PATIENCE))
        try:
            page = await patient.models.list()
            return [str(model.id) for model in page.data]
        except self._errors.APIConnectionError as error:  # a timeout is one too
            raise InputError(
                f"--base-url {url} does not answer ({first_line(error)}): is the server up? What was written is kept; "
                "run again to go on."
            ) from error
        except (self._errors.AuthenticationError, self._errors.PermissionDeniedError) as error:
            raise self._refused(error) from error
        except (self._errors.OpenAIError, ValueError, TypeError, AttributeError):
            return None

    def _refused(self, error: Any) -> InputError:
        hint = "does --api-key-env name the variable that holds the key?"
        if error.status_code == 404:
            hint = "is --model the name of what it serves, and does the URL end in /v1?"
        return InputError(
            f"--base-url {self.server.base_url} answers {error.status_code} ({first_line(error)}): {hint}"
        )

    # -- conversations -----------------------------------------------------------------------------------------------

    async def _write(self, units: Iterator[Unit], done: Callable[[Written], None]) -> None:
        running: set[asyncio.Task[Written]] = set()
        async with self._client() as client:
            try:
                while True:
                    while len(running) < self.server.concurrency and (unit := next(units, None)) is not None:
                        running.add(asyncio.create_task(self._unit(client, unit)))
                    if not running:
                        return
                    ended, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                    for task in sorted(ended, key=lambda task: task.exception() is not None):  # keep the good ones
                        done(task.result())
            finally:
                for task in running:
                    task.cancel()
                await asyncio.gather(*running, return_exceptions=True)

    async def _unit(self, client: Any, unit: Unit) -> Written:
        written = Written(unit)
        for dialogue in unit.dialogues:
            while dialogue.is_open:
                try:
                    answer, retries = await self._ask(client, dialogue)
                except self._errors.OpenAIError as error:
                    if getattr(error, "status_code", None) in (401, 403, 404):  # true of every other request too
                        raise self._refused(error) from error
                    if isinstance(error, self._errors.APIConnectionError):
                        await self._served(client)  # raises where the server is gone
                    if isinstance(error, self._repeated):
                        written.retries += self.server.retries
                    written.failed = f"{type(error).__name__}: {first_line(error)}"
                    return written
                except _BrokenError as error:
                    written.failed = str(error)
                    return written
                written.retries += retries
                dialogue.answer(answer)
        return written

    async def _ask(self, client: Any, dialogue: Dialogue) -> tuple[Answer, int]:
        """The next response, and how often the request was repeated."""
        sampling = self.sampling
        chosen = {"temperature": sampling.temperature, "top_p": sampling.top_p}
        further = {"top_k": sampling.top_k, "chat_template_kwargs": self.server.chat_arguments or None}
        reply = await client.chat.completions.with_raw_response.create(
            model=self.model,
            messages=dialogue.messages,  # thoughts too: the template decides which of them the model sees again
            max_tokens=sampling.max_new_tokens,
            seed=sampling.seed_of(dialogue.given.id, dialogue.turn),
            extra_body={k: v for k, v in further.items() if v is not None},
            **{k: v for k, v in chosen.items() if v is not None},
            **({"tools": list(dialogue.given.tools)} if dialogue.given.tools else {}),
        )
        return _answer(reply.text), reply.retries_taken


class _BrokenError(Exception):
    """A reply that is no chat completion."""


def _answer(text: str) -> Answer:
    try:
        reply = json.loads(text)
        choice, usage = reply["choices"][0], reply.get("usage") or {}
        message = choice["message"]
        content, reason = message.get("content") or "", choice.get("finish_reason") or "unknown"
        thoughts = message.get("reasoning_content") or message.get("reasoning")
        counts = int(usage.get("completion_tokens") or 0), int(usage.get("prompt_tokens") or 0)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise _BrokenError(
            f"no chat completion ({type(error).__name__}: {first_line(error)}): {text[:80]!r}"
        ) from error
    told = ("reasoning_content", str(thoughts).strip("\n")) if thoughts else None
    return Answer(str(content), str(reason), *counts, told)
