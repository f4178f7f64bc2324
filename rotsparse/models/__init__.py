"""Real trained models: read them, run them, look inside, and put rotations back into them."""
