"""A reward asked of a server that speaks OpenAI's chat completions, with the standard library."""

from __future__ import annotations

import http.client
import json
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dataflex.rewards.base import (
    PROBE_ANSWER,
    PROBE_PROMPT,
    Answered,
    RewardPrompts,
    Verdict,
    parse_score,
    refuse_probe,
    shortened,
)
from gradstore.errors import BadInput, StoreIOError

if TYPE_CHECKING:
    from torch import nn

#: The longest wait between two attempts, and the most bytes of an answer that are read.
LONGEST_WAIT_SECONDS, MOST_BYTES = 30.0, 1 << 20

#: Status codes that may be otherwise the next time; the server's own faults (5xx) too.
PASSING = (408, 409, 425, 429)


@dataclass(frozen=True)
class ApiSettings:
    """How to reach the server.

    Attributes:
        base_url: up to and without `/chat/completions`, such as http://127.0.0.1:8000/v1.
        model: the model's name there.
        key_env: environment variable that holds the key; None sends none.
        timeout: seconds an attempt may take.
        retries: further attempts after a failed one.
        workers: requests under way at once.
        max_tokens: length of an answer.
    """

    base_url: str | None
    model: str | None
    key_env: str | None = None
    timeout: float = 60.0
    retries: int = 3
    workers: int = 8
    max_tokens: int = 32

    def faults(self) -> list[str]:
        """One sentence per value that cannot work."""
        found = [
            f"reward_backend is api, but {key} is missing: {example}."
            for key, value, example in (
                ("api_base_url", self.base_url, "give a URL such as http://127.0.0.1:8000/v1"),
                ("api_model", self.model, "name the model as the server does"),
            )
            if not value
        ]
        if self.base_url:
            parts = urllib.parse.urlsplit(self.base_url)
            if parts.scheme not in ("http", "https") or not parts.hostname:
                found.append(
                    f"api_base_url is {self.base_url!r}; give a URL such as "
                    "http://127.0.0.1:8000/v1."
                )
        if self.key_env and not os.environ.get(self.key_env):
            found.append(
                f"api_key_env names {self.key_env}, but that environment variable is not set: "
                "export it, or remove api_key_env for a server without keys."
            )
        return found


class _Failed(Exception):
    """An attempt that may succeed if it is made again."""


class ApiJudge:
    """Asks a chat model for a score.

    Args:
        settings: how to reach it.
        prompts: what it is asked.
        sleep: waits between attempts; tests put their own here.
    """

    def __init__(
        self,
        settings: ApiSettings,
        prompts: RewardPrompts,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.settings = settings
        self.prompts = prompts
        self._sleep = sleep
        # A redirect would carry the key to another host.
        self._opener = urllib.request.build_opener(_NoRedirect)

    def identity(self) -> Mapping[str, Any]:
        """Server, model and the two prompts."""
        return {
            "reward": "api",
            "url": self.settings.base_url,
            "model": self.settings.model,
            "prompts": [self.prompts.with_reference, self.prompts.without_reference],
        }

    def faults(self) -> list[str]:
        """Of the settings and of the prompts."""
        return [*self.settings.faults(), *self.prompts.faults()]

    def start(self, model: nn.Module) -> None:
        """Ask once: a server that is down, or a model that cannot judge, stops the run here.

        Raises:
            StoreIOError: it cannot be reached.
            BadInput: it refuses the request, or answers without a score.
        """
        probe = Answered(PROBE_PROMPT, PROBE_ANSWER, PROBE_ANSWER)
        refuse_probe(self._who, self._one(probe))

    def judge(self, answers: Sequence[Answered]) -> list[Verdict]:
        """One request per response, several under way at once.

        Raises:
            StoreIOError: the server cannot be reached, or fails again and again.
            BadInput: it refuses the request.
        """
        pool = ThreadPoolExecutor(self.settings.workers)
        try:
            return list(pool.map(self._one, answers))
        finally:
            pool.shutdown(cancel_futures=True)

    @property
    def _who(self) -> str:
        return f"the judge {self.settings.model!r} at {self.settings.base_url}"

    def _one(self, answered: Answered) -> Verdict:
        """Ask until the server answers or no attempt is left."""
        body, failure = self._body(self.prompts.fill(answered)), ""
        for attempt in range(self.settings.retries + 1):
            if attempt:
                self._sleep(min(LONGEST_WAIT_SECONDS, 0.5 * 2.0 ** (attempt - 1)))
            try:
                said = self._attempt(body)
            except _Failed as error:
                failure = str(error)
            else:
                return Verdict(parse_score(said), said)
        raise StoreIOError(
            f"{self._who} {failure} ({self.settings.retries + 1} attempts). Look whether the "
            "server runs and has room, or raise api_timeout or api_retries."
        )

    def _body(self, text: str) -> bytes:
        return json.dumps(
            {
                "model": self.settings.model,
                "messages": [{"role": "user", "content": text}],
                "temperature": 0.0,
                "max_tokens": self.settings.max_tokens,
            }
        ).encode()

    def _attempt(self, body: bytes) -> str:
        """One request; gives the text the server answered."""
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self.settings.key_env:
            headers["Authorization"] = f"Bearer {os.environ.get(self.settings.key_env, '')}"
        url = f"{str(self.settings.base_url).rstrip('/')}/chat/completions"
        request = urllib.request.Request(url, data=body, headers=headers, method="POST")
        try:
            with self._opener.open(request, timeout=self.settings.timeout) as response:
                answer = response.read(MOST_BYTES)
        except urllib.error.HTTPError as error:
            with error:
                detail = shortened(error.read(MOST_BYTES).decode("utf-8", "replace"))
            told = f"answered {error.code} {error.reason}: {detail or 'nothing more'}"
            if error.code in PASSING or error.code >= 500:
                raise _Failed(told) from error
            raise BadInput(
                f"{self._who} {told}. Look at api_base_url, api_model and api_key_env."
            ) from error
        except TimeoutError as error:
            raise _Failed(f"did not answer within {self.settings.timeout:g} s") from error
        except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
            reason = getattr(error, "reason", None) or error
            if isinstance(reason, TimeoutError):
                raise _Failed(f"did not answer within {self.settings.timeout:g} s") from error
            raise _Failed(f"cannot be reached: {reason}") from error
        return _text_of(answer)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        """Never follow: the answer becomes an error with the redirect's status."""


def _text_of(answer: bytes) -> str:
    """The message of a chat completion."""
    try:
        content = json.loads(answer)["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError) as error:
        said = shortened(answer.decode("utf-8", "replace"))
        raise _Failed(f"answered something that is no chat completion: {said!r}") from error
    return content if isinstance(content, str) else ""
