"""The runner's side of the model proxy's control socket."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx

from kilo_pipelines.cloud_agent.transcript import Transcript
from kilo_pipelines.core.limits import Price
from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.telemetry import traces

TIMEOUT_SECONDS = 10


class ProxyError(Exception):
    """The model proxy doesn't answer, or doesn't open a session for this model."""

    def __init__(self, message: str, reason: Reason = Reason.MODEL_UNREACHABLE) -> None:
        super().__init__(message)
        self.reason = reason


def ask(socket: Path, question: dict[str, Any]) -> dict[str, Any]:
    """One structured question (`model_proxy.Question`): `arguments` of the tool's call as text or None, or a `reason`.

    Raises ProxyError when the proxy itself doesn't answer.
    """
    transport = httpx.HTTPTransport(uds=str(socket))
    with httpx.Client(transport=transport, base_url="http://proxy", timeout=question["seconds"] + TIMEOUT_SECONDS) as client:
        try:
            decoded: dict[str, Any] = (
                client.post("/questions", json={**question, "trace": traces.here()}).raise_for_status().json()
            )
        except httpx.HTTPError as failure:
            raise ProxyError(f"the model proxy doesn't answer: {type(failure).__name__}") from None
    return decoded


class ProxyClient:
    """One session at the proxy."""

    def __init__(self, socket: Path, session_id: str) -> None:
        self._client = httpx.Client(
            transport=httpx.HTTPTransport(uds=str(socket)), base_url="http://proxy", timeout=TIMEOUT_SECONDS
        )
        self._session_id = session_id

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        try:
            answer = self._client.request(method, path, json=body)
            if answer.status_code == 403:
                raise ProxyError("the model proxy refuses this model", Reason.MODEL_NOT_ALLOWED)
            answer.raise_for_status()
        except httpx.HTTPError as failure:
            raise ProxyError(f"the model proxy doesn't answer: {type(failure).__name__}") from None
        decoded: dict[str, Any] = answer.json()
        return decoded

    def register(
        self, *, model: str, turns: int, tokens: int, micro_usd: int | None, price: Price | None, mirror: Path | None
    ) -> Path:
        """Opens the session; the path of its one socket. `mirror` is the socket of its registry mirror."""
        body = {
            "session_id": self._session_id,
            "model": model,
            "turns": turns,
            "tokens": tokens,
            "micro_usd": micro_usd,
            "price": price.model_dump(mode="json") if price is not None else None,
            "mirror": str(mirror) if mirror else None,
            "trace": traces.here(),
        }
        return Path(self._ask("POST", "/sessions", body)["socket"])

    def next_part(self, nonce: str, covers: dict[str, str]) -> None:
        """Announces the conversation that comes next."""
        self._ask("POST", f"/sessions/{self._session_id}/part", {"nonce": nonce, "covers": covers})

    def transcript(self) -> Transcript:
        """What the proxy saw so far."""
        return Transcript.model_validate(self._ask("GET", f"/sessions/{self._session_id}"))

    def end(self) -> Transcript | None:
        """Ends the session at the proxy, of whichever launch it is; its last reading, None when the proxy knows of none."""
        try:
            answer = self._client.delete(f"/sessions/{self._session_id}")
            return None if answer.status_code == 404 else Transcript.model_validate(answer.raise_for_status().json())
        except httpx.HTTPError as failure:
            raise ProxyError(f"the model proxy doesn't answer: {type(failure).__name__}") from None

    def close(self) -> None:
        """Closes the connection to the proxy."""
        self._client.close()
