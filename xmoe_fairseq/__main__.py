"""``python -m xmoe_fairseq`` is the command ``xmoe``."""

from .cli import main

if __name__ == "__main__":
    main()
