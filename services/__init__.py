"""What reads a store: queries, checks, reports, and the command line."""
