"""Internal basics for all other packages: orthogonal matrices, checks of input, files, locks, signals."""
