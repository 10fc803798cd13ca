"""Files of other worlds, and files that run without this project.

`names` says what a parameter is called elsewhere, `huggingface` and `original` what their models are, `tensors` reads
and writes the files, and `portable` writes what needs none of them.
"""
