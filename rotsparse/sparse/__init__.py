"""Sparse inputs for inference: coordinates of what enters a linear map are dropped, in a basis that loses little."""
