"""What a model computed when it read a text: captured, stored and loaded."""
