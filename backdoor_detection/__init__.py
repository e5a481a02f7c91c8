"""Task 3: is a given model backdoored? One statistic a class, then an outlier test."""
