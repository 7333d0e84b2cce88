"""Data from outside: folders of images, files of arrays, tables of images.

What is wrong with a source is found before training, and said in one line that names the file.
"""
