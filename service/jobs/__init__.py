"""Jobs: files of texts that are classified in the background, with lower priority than requests."""
