"""A reward asked of a server that speaks OpenAI's chat completions, through httpx."""

from __future__ import annotations

import contextlib
import json
import os
import ssl
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit
from urllib.request import getproxies

from dataflex.config.secrets import is_variable, keep_secret, redacted
from dataflex.rewards.base import (
    PROBE_ANSWER,
    PROBE_PROMPT,
    JudgeRequest,
    RewardPrompts,
    Verdict,
    parse_score,
    refuse_probe,
    shortened,
)
from gradstore.errors import BadInput, StoreIOError
from gradstore.format.foreign import read_json

if TYPE_CHECKING:
    import httpx
    from torch import nn

#: The longest wait between two attempts, and the most bytes of an answer that are read.
LONGEST_WAIT_SECONDS, MOST_BYTES = 30.0, 1 << 20

#: Status codes that are tried again; the server's own faults (5xx) are, too.
PASSING = (408, 409, 425, 429)

#: An idle connection is given up before a server closes it: many do so after 5 s.
IDLE_SECONDS = 2.0


@dataclass(frozen=True)
class ApiSettings:
    """Connection settings of the server.

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
    key_env: str | None
    timeout: float
    retries: int
    workers: int
    max_tokens: int

    def faults(self) -> list[str]:
        """Return one sentence per value that cannot work."""
        found = [
            f"reward_backend is api, but {key} is missing: {example}."
            for key, value, example in (
                ("api_base_url", self.base_url, "give a URL such as http://127.0.0.1:8000/v1"),
                ("api_model", self.model, "name the model as the server does"),
            )
            if not value
        ]
        if self.base_url:
            found += _url_faults(self.base_url)
        if self.key_env:
            found += _key_faults(self.key_env)
        return found


def _url_faults(url: str) -> list[str]:
    """Refuse a URL that names no server, or that would show a secret in every message."""
    if "@" in url or "?" in url or "#" in url:
        return [
            "api_base_url holds a user name or a password, or parameters: remove all but "
            "http://host:port/path, and name the environment variable of a key in api_key_env."
        ]
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        return [f"api_base_url is {url!r}; give a URL such as http://127.0.0.1:8000/v1."]
    return []


def _key_faults(name: str) -> list[str]:
    """Refuse a key that is missing, or that no header can carry; the key itself is not shown."""
    key = os.environ.get(name)
    if not is_variable(name) and not key:
        return [
            "api_key_env is not the name of an environment variable that is set (its value is not "
            "shown: it may be a key). Export the key, as in JUDGE_KEY, and set api_key_env: "
            "JUDGE_KEY."
        ]
    if not key:
        return [
            f"api_key_env names {name}, but that environment variable is not set: export it, or "
            "remove api_key_env for a server without keys."
        ]
    keep_secret(key)
    if not (key.isascii() and key.isprintable()) or key != key.strip():
        return [
            f"api_key_env names {name}, but the key in that environment variable begins or ends "
            "with a blank, or has a line break or another character that an HTTP header cannot "
            "carry: export it again without them."
        ]
    return []


def _keep_passwords_of_proxies() -> None:
    """Know the passwords in the URLs of HTTP_PROXY and its like, which errors may quote."""
    for url in getproxies().values():
        with contextlib.suppress(ValueError):
            keep_secret(unquote(urlsplit(url).password or ""))


class _RetryableError(Exception):
    """An attempt that may succeed if it is made again."""


class ApiJudge:
    """Judge that asks a chat model for a score.

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

    def identity(self) -> Mapping[str, Any]:
        """Return the server, the model and the two prompts."""
        return {
            "reward": "api",
            "url": self.settings.base_url,
            "model": self.settings.model,
            "prompts": [self.prompts.with_reference, self.prompts.without_reference],
        }

    def faults(self) -> list[str]:
        """Return the faults of the settings and of the prompts."""
        return [*self.settings.faults(), *self.prompts.faults()]

    def start(self, model: nn.Module) -> None:
        """Ask once: a server that is down, or a model that cannot judge, stops the run here.

        Raises:
            StoreIOError: it cannot be reached.
            BadInput: it refuses the request, or answers without a score.
        """
        probe = JudgeRequest(PROBE_PROMPT, PROBE_ANSWER, PROBE_ANSWER)
        with self._client() as client:
            verdict = self._one(client, probe)
        refuse_probe(self._label, verdict)

    def judge(self, requests: Sequence[JudgeRequest]) -> list[Verdict]:
        """Send one request per response, several in flight at once.

        Raises:
            StoreIOError: the server cannot be reached, or fails again and again.
            BadInput: it refuses the request.
        """
        with self._client() as client:
            pool = ThreadPoolExecutor(self.settings.workers)
            try:
                return list(pool.map(lambda request: self._one(client, request), requests))
            finally:
                pool.shutdown(cancel_futures=True)

    @property
    def _label(self) -> str:
        return f"the judge {self.settings.model!r} at {self.settings.base_url}"

    def _client(self) -> httpx.Client:
        """Open a connection pool; redirects are not followed: they would take the key along.

        Raises:
            BadInput: the environment names a proxy that cannot be used.
        """
        import httpx

        settings = self.settings
        headers = {
            "Content-Type": "application/json",
            "Accept": "application/json",
            "Accept-Encoding": "identity",
        }
        if settings.key_env:
            faults = _key_faults(settings.key_env)
            if faults:
                raise BadInput(faults[0])
        _keep_passwords_of_proxies()
        if settings.key_env:
            headers["Authorization"] = f"Bearer {os.environ[settings.key_env]}"
        try:
            return httpx.Client(
                headers=headers,
                timeout=httpx.Timeout(settings.timeout, pool=None),
                limits=httpx.Limits(
                    max_connections=settings.workers, keepalive_expiry=IDLE_SECONDS
                ),
                # Certificates that this machine trusts; httpx by itself uses certifi's list.
                verify=ssl.create_default_context(),
                follow_redirects=False,
            )
        except (ImportError, ValueError, httpx.InvalidURL) as error:
            raise BadInput(
                f"{self._label} cannot be reached through the proxies of HTTP_PROXY, HTTPS_PROXY "
                "or ALL_PROXY: give http:// addresses, or pip install 'httpx[socks]' for socks5://."
            ) from error

    def _one(self, client: httpx.Client, request: JudgeRequest) -> Verdict:
        """Ask until the server answers or no attempt is left."""
        body, failure = self._body(self.prompts.fill(request)), ""
        for attempt in range(self.settings.retries + 1):
            if attempt:
                self._sleep(min(LONGEST_WAIT_SECONDS, 0.5 * 2.0 ** (attempt - 1)))
            try:
                text = self._attempt(client, body)
            except _RetryableError as error:
                failure = str(error)
            else:
                return Verdict(parse_score(text), redacted(text))
        raise StoreIOError(
            f"{self._label} {failure} ({self.settings.retries + 1} attempts). Check that the "
            "server runs and is not overloaded, or raise api_timeout or api_retries."
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

    def _attempt(self, client: httpx.Client, body: bytes) -> str:
        """Send one request and return the text the server answered."""
        import httpx

        url = f"{str(self.settings.base_url).rstrip('/')}/chat/completions"
        try:
            with client.stream("POST", url, content=body) as response:
                answer = _beginning(response)
        except httpx.TimeoutException as error:
            raise _RetryableError(f"did not answer within {self.settings.timeout:g} s") from error
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise _RetryableError(
                f"cannot be reached: {redacted(str(error)) or type(error).__name__}"
            ) from error
        if response.is_success:
            return self._text_of(answer)
        reply = (
            f"answered {response.status_code} {redacted(response.reason_phrase)}: "
            f"{self._shown(answer) or 'an empty body'}"
        )
        if response.status_code in PASSING or response.is_server_error:
            raise _RetryableError(reply)
        raise BadInput(f"{self._label} {reply}. Check api_base_url, api_model and api_key_env.")

    def _text_of(self, answer: bytes) -> str:
        """Extract the message of a chat completion."""
        try:
            content = read_json(answer)["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError) as error:
            text = self._shown(answer)
            raise _RetryableError(
                f"answered something that is no chat completion: {text!r}"
            ) from error
        return content if isinstance(content, str) else ""

    @staticmethod
    def _shown(answer: bytes) -> str:
        """Shorten an answer for a message, and remove the key if the server repeats it."""
        return shortened(redacted(answer.decode("utf-8", "replace")))


def _beginning(response: httpx.Response) -> bytes:
    """Read the first `MOST_BYTES` of an answer; the rest is never read."""
    found = bytearray()
    for chunk in response.iter_bytes():
        found += chunk
        if len(found) >= MOST_BYTES:
            break
    return bytes(found[:MOST_BYTES])
