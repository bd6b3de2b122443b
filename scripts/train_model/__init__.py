"""Train the small language model that ships with kvp_edge.

Read the files in this order: `config` (sizes and schedule), `books` and `tokenizer` (plain text to
tokens), `tasks` (generated look-up tasks), `model`, `optimizer`, `train`, then `export` (GGUF) and
`evaluate` with `ngram` (every figure of the model card).
"""
