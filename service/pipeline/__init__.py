"""The work of a frontend on the texts of a request, from tokens to answers."""
