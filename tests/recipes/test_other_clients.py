"""What clients do that none of those here does."""

from __future__ import annotations

import http.client
import json
import re

from support.server import Server


def test_a_client_that_offers_http_2_is_answered_and_leaves_no_word(server: Server) -> None:
    """Java's offers it with every request, as curl --http2 does."""
    before = len(server.said)
    body = json.dumps({"messages": [{"role": "user", "content": "Hello."}], "max_tokens": 3})
    upgrade = {
        "Connection": "Upgrade, HTTP2-Settings",
        "Upgrade": "h2c",
        "HTTP2-Settings": "AAMAAABkAAQCAAAAAAIAAAAA",
        "Content-Type": "application/json",
        **server.headers,
    }
    line = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    for _ in range(2):  # it stays open
        line.request("POST", "/v1/chat/completions", body, upgrade)
        answer = line.getresponse()
        assert (answer.status, answer.version) == (200, 11)
        assert json.loads(answer.read())["usage"]["completion_tokens"] == 3
    line.close()
    server.ask("/health")
    said = server.said[before:].splitlines()
    assert [words for words in said if not re.match(r"[\d:]{8} read \d+ of", words)] == []
