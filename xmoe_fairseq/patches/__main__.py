"""Prints docs/patches.md."""

from .groups import ALL
from .registry import page

INTRODUCTION = """# What the plugin changes in stock fairseq

Importing `xmoe_fairseq` changes functions of fairseq in this process; no file of fairseq is changed. `python -m
xmoe_fairseq.patches` makes this page from [`xmoe_fairseq/patches/`](../xmoe_fairseq/patches/), and a test compares.

A patch gets the stock function and calls it, or does its work. Before anything is changed, the parameters of all stock
functions are compared with those that the patches expect; if one differs, the import ends with one line. A function
that another plugin has wrapped is wrapped once more. Installing again changes nothing. torch's allow-list of classes
in checkpoints gets `argparse.Namespace` and plain values of NumPy.
"""


def whole_page() -> str:
    """Returns the text of docs/patches.md."""
    return INTRODUCTION + page(ALL)


if __name__ == "__main__":
    print(whole_page(), end="")
