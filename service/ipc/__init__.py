"""Messages between the processes of one server, and the connections that carry them."""
