"""``kvp-edge serve``: an OpenAI-compatible server in front of ``kvp_edge.Llama``."""
