"""Models of other toolkits: ``xmoe import`` and ``xmoe export``."""
