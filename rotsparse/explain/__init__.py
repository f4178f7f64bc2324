"""What the directions of a fitted basis mean: their examples, partners, neurons and words, and the page of them."""
