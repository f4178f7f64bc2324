"""What everything else rests on and nobody calls from outside: orthogonal matrices, checks, files, locks, signals."""
