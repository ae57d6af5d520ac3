"""Ask a running server that speaks OpenAI's API."""

from __future__ import annotations

import json
from collections.abc import Mapping
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from interp.errors import UserError
from interventions.config import UNEDITED

_PATIENCE = 600


class Server:
    """A server of a model and of edits that requests choose by the name of their model.

    Args:
        url: Where it listens, for example ``http://localhost:8000``.
        api_key: What it wants as a bearer token; ``None`` sends none.

    Attributes:
        names: The names of the models that it lists.

    Raises:
        UserError: If it cannot be reached.
    """

    def __init__(self, url: str, api_key: str | None = None) -> None:
        self._url = url.rstrip("/").removesuffix("/v1")
        self._key = api_key
        listed = self._asked("/v1/models")
        if not isinstance(listed, dict) or not all("id" in entry for entry in listed.get("data") or [{}]):
            raise UserError(f"{url} lists no models as OpenAI's API does; check --url.")
        self._listed: list[dict[str, Any]] = listed["data"]
        self.names = [str(entry["id"]) for entry in self._listed]

    def model(self, edit: str) -> str:
        """What requests call an edit; one that is not listed may be found by the server on demand."""
        for name in self.names:
            if name == edit or name.endswith(f":{edit}"):
                return name
        if edit == UNEDITED:
            return next(str(entry["id"]) for entry in self._listed if not entry.get("parent"))
        return edit

    def answer(self, edit: str, prompt: str, max_new_tokens: int) -> str:
        """What is answered to a prompt, greedily.

        Raises:
            UserError: If the server refuses, or does not answer.
        """
        body = {"model": self.model(edit), "prompt": prompt, "max_tokens": max_new_tokens, "temperature": 0}
        return self._asked("/v1/completions", body)["choices"][0]["text"]

    def _asked(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        content = None if body is None else json.dumps(body).encode()
        try:
            with urlopen(Request(self._url + path, content, headers), timeout=_PATIENCE) as response:
                return json.load(response)
        except HTTPError as error:
            reason = error.read(2000).decode(errors="replace")
            raise UserError(
                f"{self._url}{path} refused the request ({error.code}: {reason}); mend what it says."
            ) from error
        except (URLError, OSError, ValueError, HTTPException) as error:
            reason = getattr(error, "reason", error)
            raise UserError(f"{self._url} does not answer ({reason}); start the server, or check --url.") from error
