"""How good generated images are, and how fast they are made."""
