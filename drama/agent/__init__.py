"""What decides a result; `shapes` says what the letters in shapes mean."""
