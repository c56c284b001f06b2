"""A trained radiance field in forms that other programs read.

A form is a module with a function `write(run, path, options) -> str`, which writes one file and returns a line that
says what is in it, a config with its options, and an entry in `jaxngp.export.FORMATS`. What has coordinates is written
in those of the scene's source (`run.transform`).
"""
