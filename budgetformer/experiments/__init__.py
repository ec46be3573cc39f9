"""Reports and studies: the frontier, the rivals, the recipe of the paper."""
