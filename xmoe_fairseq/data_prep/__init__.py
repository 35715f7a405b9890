"""Preparing text for a benchmark: ``xmoe prepare``, which ``data_prep/prepare.sh`` calls."""
