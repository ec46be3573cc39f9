"""The cost of a pass: counted multiply-adds and measured seconds."""
