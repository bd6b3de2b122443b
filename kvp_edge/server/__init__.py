"""``kvp-edge serve``: OpenAI's protocol, with every chat in a KV log of its own."""
