"""``xmoe analyze``: where the capacity goes, by language, layer, token and position."""
