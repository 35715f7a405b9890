"""Scores of a run with sacreBLEU, its use of experts, and the page that shows both."""
