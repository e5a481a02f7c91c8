"""The only place with a command line: predict, score as the organizers score, record."""
