"""What scripts/eval_labels.py consists of."""
