"""Basics used by all other packages: orthogonal matrices, checks of input, files, locks, signals."""
