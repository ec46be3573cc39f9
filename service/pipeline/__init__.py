"""What a frontend does with the texts of a request, from tokens to answers."""
