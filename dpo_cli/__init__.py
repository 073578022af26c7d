"""A lightweight DPO trainer for the command line."""
