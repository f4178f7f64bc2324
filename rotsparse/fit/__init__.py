"""Fits: one loop (`minimize`) and what is built on it."""
