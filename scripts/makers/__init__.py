"""Random models, states, policies and traces, and devices: for tests and benchmarks."""
