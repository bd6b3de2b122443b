"""What scripts/eval_recall.py is made of: conversations, ways to answer from them, the table."""
