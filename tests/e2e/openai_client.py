"""OpenAI's own client, pointed at a server under test."""

from openai import OpenAI

from tests.e2e.harness import RPC_TIMEOUT_S, Running


def connect(server: Running, max_retries: int = 0) -> OpenAI:
    return OpenAI(
        base_url=server.server.openai_url,
        api_key="none",
        max_retries=max_retries,
        timeout=RPC_TIMEOUT_S,
    )
