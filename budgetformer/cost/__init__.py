"""What a pass costs: multiply-adds, counted, and seconds, measured."""
