"""Reports and studies: the frontier, the baselines, the recipe of the paper."""
