"""The engine: methods and the loop that takes their steps; how a fit is saved, logged, interrupted and resumed."""
