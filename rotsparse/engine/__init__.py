"""Methods and the loop that runs them; how a fit is saved, logged, interrupted and resumed."""
