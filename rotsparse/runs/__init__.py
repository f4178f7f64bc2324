"""Run folders, their list, and the run that fits one layer and writes everything down."""
