"""One mechanism per file; the file's name is the method's
name. Nothing is listed here: see `kvtune.parts.names`."""
