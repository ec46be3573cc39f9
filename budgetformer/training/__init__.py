"""From a pretrained encoder, or from nothing, to a calibrated checkpoint."""
