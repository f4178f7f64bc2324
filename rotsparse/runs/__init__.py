"""Run folders, the list of runs, and the job that fits one layer and writes the results."""
