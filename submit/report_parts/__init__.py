"""The parts of a report page: what each task shows, from its records to plain values that the templates lay out."""
