"""Evidence: baselines, metrics, nulls, verdicts."""
