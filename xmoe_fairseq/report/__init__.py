"""``xmoe report``: one run on a page: training curves, scores, where the capacity goes, translations token by token."""
