"""Clients of servers in tests.

A server ends a connection that has been idle for five seconds, which no request may meet: it is given up before that.
"""

from typing import Any

import httpx
from openai import OpenAI

_LIMITS = httpx.Limits(keepalive_expiry=1)


def http_client(url: str, **settings: Any) -> httpx.Client:
    return httpx.Client(base_url=url, limits=_LIMITS, **settings)


def openai_client(url: str, key: str = "none", timeout: float = 300) -> OpenAI:
    """The official client, which tries nothing twice."""
    asks = httpx.Client(timeout=timeout, limits=_LIMITS)
    return OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=timeout, http_client=asks)
