"""Reports and studies: the frontier report with its baselines, and the paper's recipe."""
