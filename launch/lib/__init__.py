"""The parts that the programs share."""
