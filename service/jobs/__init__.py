"""Files of texts that are classified in the background, behind all requests."""
