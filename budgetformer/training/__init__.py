"""Train, calibrate and evaluate checkpoints, from a pretrained encoder or from scratch."""
