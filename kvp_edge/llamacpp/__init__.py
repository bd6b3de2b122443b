"""What is needed of llama.cpp beside the cache: its log, its aborts, its context shift."""
