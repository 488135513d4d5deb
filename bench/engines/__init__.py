"""Whole answers of the same model by the engines that people use on a CPU, each in a process of its own."""
