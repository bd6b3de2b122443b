"""Training eviction policies with PyTorch (extra ``train``): traces in, policy checkpoint out."""
