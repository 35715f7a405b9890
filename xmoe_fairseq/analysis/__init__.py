"""``xmoe analyze``: where the capacity goes, by language, layer, token and position."""

import logging

# Importing fairseq leaves the root logger at the level of debugging, where matplotlib tells of its folders.
logging.getLogger("matplotlib").setLevel(logging.WARNING)
