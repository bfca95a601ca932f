"""Where images come from: folders, tars, tables of bytes, lists of files."""
