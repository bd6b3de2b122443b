"""What scripts/eval_memory.py is made of."""
