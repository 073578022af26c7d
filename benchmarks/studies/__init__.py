"""The studies behind docs/results.md, and the tables and pictures of other pages."""
