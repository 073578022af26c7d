"""Plots, HTML reports and text tables of results."""
