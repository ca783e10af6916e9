"""What is wrong with the machines, the corpus or the run, found before GPU hours are spent."""
