"""Tokens as text: chat templates, spans, and the tokens of a text that was read before."""
