"""The algorithms of the literature as compositions."""
