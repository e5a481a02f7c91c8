"""Task 1: an image and a request in words to the image asked for."""
