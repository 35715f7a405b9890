"""Scores of a run with sacreBLEU, and its use of experts."""
