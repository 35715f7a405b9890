"""The commands of ``xmoe``: one module each, with ``main(argv)``."""
